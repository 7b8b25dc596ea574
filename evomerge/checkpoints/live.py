"""A live model: built once on a device, its weights then written in place for every candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from evomerge.checkpoints.attention import use_grouped_attention
from evomerge.checkpoints.config import first_line
from evomerge.checkpoints.finite import first_not_finite
from evomerge.checkpoints.placement import Devices, as_devices, compute_where_weights_are, place_model
from evomerge.checkpoints.processor import open_processor
from evomerge.checkpoints.residual import residual_writers
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.stack import Stack
from evomerge.checkpoints.structure import (
    empty_model,
    layer_stack,
    parse_config,
    stored_tensors,
    text_config,
)
from evomerge.checkpoints.tokenizer_files import load_tokenizer
from evomerge.errors import InputError
from evomerge.recipes.use import ExpertUse

_PROBE_TOKENS = 8


class NotFiniteError(Exception):
    """A live model contains or computes NaN or Inf. ``where`` is the tensor's name, or "logits"."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where

    def __str__(self) -> str:
        return f"NaN or Inf in {self.where}"


class ServingEngine(Protocol):
    """An engine that serves a live model's weights instead of transformers; see ``evomerge.inference``."""

    def load(self, live: LiveModel) -> None:
        """Load the current weights, and discard everything that was computed with older ones."""
        ...


class Meter(Protocol):
    """Accumulates the use of experts while a model answers."""

    def take(self) -> ExpertUse | None:
        """The use since the last call; None if no token was processed."""
        ...


@dataclass
class LiveModel:
    """A model on one or more devices, ready to be written to and scored.

    Attributes:
        model: a transformers ``PreTrainedModel`` in eval mode, without gradients; for a table of tensors, which cannot
            be run, its location (``evomerge.raw.written``).
        tokenizer: its tokenizer, padding on the left, with a padding token; None for a table of tensors.
        outside: the tensors outside the stack of layers, by their names in the source.
        stack: its layers; None for a model that is never written to.
        engine: the engine that answers prompts; None for transformers.
        devices: the devices that its layers are spread over; the model's own if empty.
        change: how far its weights are from those of the search's base; None if not measured.
        processor_of: loads the processor for text and pictures, once; None for a text model.
        use: measures how much tokens use each expert; None for a model without such gated experts.
    """

    model: Any
    tokenizer: Any
    outside: Mapping[str, torch.Tensor] = field(default_factory=dict)
    stack: Stack | None = None
    engine: ServingEngine | None = None
    devices: tuple[torch.device, ...] = ()
    change: float | None = None
    use: Meter | None = None
    processor_of: Callable[[], Any] | None = None

    @property
    def device(self) -> torch.device:
        """The device of its inputs and logits: the first one."""
        device: torch.device = self.devices[0] if self.devices else self.model.device
        return device

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by their names in the merged model. Experts that the model combines in one are views into it."""
        if self.stack is None:
            return dict(self.model.named_parameters())
        return {**self.outside, **dict(self.stack.tensors())}


def live_model(
    source: Source, device: Devices, dtype: torch.dtype | None = None, layer_buffers: int | None = None
) -> LiveModel:
    """Build the model of a source on a device, without its weights.

    Weights are NaN until they are written, so that a tensor that was not written cannot pass ``check_live``.

    Args:
        source: provides structure, tokenizer and generation settings.
        device: the model's device; with several devices, layers are spread over them, see ``placement``.
        dtype: the dtype of its weights; that of the source if None.
        layer_buffers: the maximum number of distinct layers of a recipe; there is always memory for the source's.

    Raises:
        InputError: the tokenizer or the generation settings cannot be loaded.
    """
    devices = as_devices(device)
    parsed = parse_config(source.config, source.place)
    model, placed = unwritten_model(parsed, source, devices, dtype or source.dtype, layer_buffers)
    name, layers = layer_stack(model, source.layers)
    stored = stored_tensors(model)
    outside = {n: part.of(stored[part.tensor]) for n, part in source.parts.items() if source.roles[n].layer is None}
    text = text_config(model.config)
    writers = [residual_writers(layer, text.model_type, text) for layer in layers]
    stack = Stack(model, name, layers, source.parts, source.roles, placed, writers)
    tokenizer, processor_of = load_tokenizer(source), processor_opener(source)
    return LiveModel(model, tokenizer, outside, stack, devices=devices, processor_of=processor_of)


def processor_opener(source: Source) -> Callable[[], Any] | None:
    """A function that loads a source's processor on first use, and only once; None for a text model.

    It raises InputError if there is no processor, or if it cannot be loaded.
    """
    if not source.takes_images:
        return None
    return cache(partial(open_processor, source))


def unwritten_model(
    parsed: Any, source: Source, devices: Sequence[torch.device], dtype: torch.dtype, layer_buffers: int | None = None
) -> tuple[Any, list[torch.device]]:
    """A transformers model with memory for its weights, which are NaN; it can be scored once they are written.

    Args:
        parsed: its configuration.
        source: provides generation settings, and is named in messages; it has the same number of layers.
        layer_buffers: as for ``live_model``.

    Returns:
        The model, and the device of each of its layer buffers.

    Raises:
        InputError: it cannot be built, or the generation settings cannot be loaded.
    """
    model = empty_model(parsed, source.place, dtype)
    placed = place_model(model, layer_stack(model, source.layers)[1], devices, layer_buffers or source.layers)
    for tensor in stored_tensors(model).values():
        tensor.data.fill_(torch.nan)
    _compute_buffers(model)
    for_scoring(model)
    if (source.folder / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(source.folder)
        except Exception as error:  # an unusual value may raise anything inside transformers
            raise InputError(source.place, f"generation_config.json cannot be used: {first_line(error)}") from error
    return model, placed


def configured(live: LiveModel, source: Source) -> LiveModel:
    """The weights of a live model under another configuration: the same memory, in separate modules.

    Args:
        source: provides the configuration; it has one layer per hop of the live model, with the same tensors.
    """
    model = empty_model(parse_config(source.config, source.place), source.place, live.model.dtype)
    model.load_state_dict(live.model.state_dict(keep_vars=True), assign=True)
    homes = {name: buffer.device for name, buffer in live.model.named_buffers()}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:  # which is not stored in files
                home = homes.get(f"{path}.{name}", live.device)
                module._buffers[name] = torch.empty_like(buffer, device=home)
    if len(live.devices) > 1:
        compute_where_weights_are(model, layer_stack(model, source.layers)[1])
    _compute_buffers(model)
    for_scoring(model)
    model.generation_config = live.model.generation_config
    return LiveModel(model, live.tokenizer, devices=live.devices, processor_of=live.processor_of)


def _compute_buffers(model: Any) -> None:
    """Compute buffers that are not stored in files, such as the rotary frequencies, without changing stored tensors."""
    for tensor in stored_tensors(model).values():
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()  # skips what is marked as initialised, as in from_pretrained
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0  # RWKV would halve weights in place, but only once, not those written later


def for_scoring(model: Any) -> Any:
    """Put a transformers model into eval mode, without gradients, and make it multiply whole batches by matrices.

    torch multiplies row by row, each time with a copy of the matrix, if a batch is not contiguous and the matrix needs
    no gradient. This concerns a head when only the logits of the last tokens are requested, and a matrix next to a
    convolution, for which the sequence is transposed. With a vocabulary of 50,000 such a head took 10 s and 3 GB for 60
    rows in bfloat16 on a CPU, instead of 0.02 s.

    Returns:
        The model itself.
    """
    inside = set(model.base_model.modules()) - {model}
    heads = {model.get_output_embeddings(), *model.modules()} - inside
    in_convolutions = {child for module in model.modules() if _has_convolution(module) for child in module.children()}
    for module in heads | in_convolutions:
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(_as_one_matrix)
    use_grouped_attention(model)
    return model.eval().requires_grad_(False)


def _has_convolution(module: torch.nn.Module) -> bool:
    return any(isinstance(child, torch.nn.Conv1d) for child in module.children())


def _as_one_matrix(module: torch.nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
    """The batch, copied unless it is contiguous, with the strides of a single matrix."""
    (batch,) = given
    return batch.contiguous().view(-1, batch.shape[-1]).view(batch.shape)


@torch.no_grad()
def load_weights(live: LiveModel, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write tensors into the model in place, cast to its dtype. A tied head follows the embedding.

    Raises:
        KeyError: the model stores no tensor with that name (a tied head has none of its own).
        ValueError: the shapes differ.
    """
    targets = live.tensors
    for name, tensor in tensors:
        target = targets[name]
        if tensor.shape != target.shape:  # copy_ would broadcast
            raise ValueError(f"{name} has shape {list(target.shape)}, not {list(tensor.shape)}")
        target.copy_(tensor)


def check_live(live: LiveModel) -> None:
    """Reject a model with NaN or Inf in its weights or in its logits for a short probe.

    Otherwise such a model would silently be scored: at chance, or as perfect if the right answer is always the first.

    Raises:
        NotFiniteError: naming the tensor, or "logits".
    """
    check_weights(live)
    if not all(finite_rows(live, 1)):
        raise NotFiniteError("logits")


@torch.inference_mode()
def check_weights(live: LiveModel) -> None:
    """Reject a model with NaN or Inf in its weights.

    Raises:
        NotFiniteError: naming the tensor.
    """
    distinct: dict[object, tuple[str, torch.Tensor]] = {}  # a layer used for several hops is checked once
    for name, tensor in live.tensors.items():
        distinct.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor))
    if (broken := first_not_finite(dict(distinct.values()))) is not None:
        raise NotFiniteError(broken)


@torch.inference_mode()
def finite_rows(live: LiveModel, rows: int) -> list[bool]:
    """Whether the logits for a short probe are finite, in each of this many equal rows."""
    probe = torch.arange(_PROBE_TOKENS, device=live.device) % text_config(live.model.config).vocab_size
    logits = live.model(probe.expand(rows, -1), use_cache=False).logits
    finite: list[bool] = torch.isfinite(logits).flatten(1).all(dim=1).tolist()
    return finite
