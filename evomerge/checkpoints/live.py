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
    """A live model holds or computes NaN or Inf. ``where`` is the tensor's name, or "logits"."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where

    def __str__(self) -> str:
        return f"NaN or Inf in {self.where}"


class ServingEngine(Protocol):
    """What answers with a live model's weights in place of transformers; see ``evomerge.inference``."""

    def load(self, live: LiveModel) -> None:
        """Take the weights as they are now, and forget whatever was computed with older ones."""
        ...


class Meter(Protocol):
    """Adds up the use of experts while a model answers."""

    def take(self) -> ExpertUse | None:
        """The use since it was taken last; None where no token has passed."""
        ...


@dataclass
class LiveModel:
    """A model on a device or several, ready to be written to and scored.

    Attributes:
        model: a transformers ``PreTrainedModel`` in eval mode, without gradients; of a table of tensors, which nothing
            runs, where it lies (``evomerge.raw.written``).
        tokenizer: its tokenizer, padding on the left, with a padding token; None of a table of tensors.
        outside: the tensors outside the stack of layers, by their names in the source.
        stack: its layers; None for a model that is never written to.
        engine: what answers prompts; None for transformers.
        devices: those that share out its layers; the model's own when empty.
        change: how far its weights are from those of the search's base; None where nobody measures it.
        processor_of: opens what makes its inputs of text and pictures, once; None of a model that reads text alone.
        use: measures how much of each expert tokens get; None of a model without experts that are gated beside it.
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
        """Where it takes tokens and gives logits: the first device."""
        device: torch.device = self.devices[0] if self.devices else self.model.device
        return device

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by their names in the merged model. Experts that the model holds in one are views into it."""
        if self.stack is None:
            return dict(self.model.named_parameters())
        return {**self.outside, **dict(self.stack.tensors())}


def live_model(
    source: Source, device: Devices, dtype: torch.dtype | None = None, layer_buffers: int | None = None
) -> LiveModel:
    """Build the model of a source on a device, without its weights.

    Weights are NaN until they are written, so that a tensor nobody wrote cannot pass ``check_live``.

    Args:
        source: gives structure, tokenizer and generation settings.
        device: where the model lives; several devices share out its layers, see ``placement``.
        dtype: of its weights; that of the source when None.
        layer_buffers: most different layers that a recipe is made of; those of the source have memory always.

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
    """What opens a source's processor when pictures are first asked about, and once; None of a model of texts.

    It raises InputError: there is no processor, or none that can be loaded.
    """
    if not source.takes_images:
        return None
    return cache(partial(open_processor, source))


def unwritten_model(
    parsed: Any, source: Source, devices: Sequence[torch.device], dtype: torch.dtype, layer_buffers: int | None = None
) -> tuple[Any, list[torch.device]]:
    """A transformers model with memory for its weights, which are NaN, ready to be scored when they are written.

    Args:
        parsed: its configuration.
        source: gives generation settings, and is the model that messages name; of as many layers.
        layer_buffers: as of ``live_model``.

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
        except Exception as error:  # whatever a strange value does inside transformers
            raise InputError(source.place, f"generation_config.json cannot be used: {first_line(error)}") from error
    return model, placed


def configured(live: LiveModel, source: Source) -> LiveModel:
    """The weights of a live model as another configuration has them run: the same memory, in modules of its own.

    Args:
        source: gives the configuration; it has as many layers as the live model has hops, of the same tensors.
    """
    model = empty_model(parse_config(source.config, source.place), source.place, live.model.dtype)
    model.load_state_dict(live.model.state_dict(keep_vars=True), assign=True)
    homes = {name: buffer.device for name, buffer in live.model.named_buffers()}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:  # which no file holds
                home = homes.get(f"{path}.{name}", live.device)
                module._buffers[name] = torch.empty_like(buffer, device=home)
    if len(live.devices) > 1:
        compute_where_weights_are(model, layer_stack(model, source.layers)[1])
    _compute_buffers(model)
    for_scoring(model)
    model.generation_config = live.model.generation_config
    return LiveModel(model, live.tokenizer, devices=live.devices, processor_of=live.processor_of)


def _compute_buffers(model: Any) -> None:
    """Compute what no file holds, such as the rotary frequencies, and leave all that is stored."""
    for tensor in stored_tensors(model).values():
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()  # passes over what is marked, as in from_pretrained
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0  # RWKV would halve weights in place, once, and not those written later


def for_scoring(model: Any) -> Any:
    """Put a transformers model into eval mode, without gradients, and have its matrices multiply whole batches.

    torch multiplies row by row, each time with a copy of the matrix, where a batch does not lie in memory as one and
    the matrix needs no gradient. That is what a head meets when only the last tokens' logits are asked for, and what a
    matrix beside a convolution meets, for which the sequence is turned. With a vocabulary of 50,000 such a head took
    10 s and 3 GB for 60 rows in bfloat16 on a processor, where 0.02 s will do.

    Returns:
        The model itself.
    """
    inside = set(model.base_model.modules()) - {model}
    heads = {model.get_output_embeddings(), *model.modules()} - inside
    beside = {child for module in model.modules() if _has_convolution(module) for child in module.children()}
    for module in heads | beside:
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(_as_one_matrix)
    use_grouped_attention(model)
    return model.eval().requires_grad_(False)


def _has_convolution(module: torch.nn.Module) -> bool:
    return any(isinstance(child, torch.nn.Conv1d) for child in module.children())


def _as_one_matrix(module: torch.nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
    """The batch, copied where it does not lie in memory as one matrix, and with the strides of one."""
    (batch,) = given
    return batch.contiguous().view(-1, batch.shape[-1]).view(batch.shape)


@torch.no_grad()
def load_weights(live: LiveModel, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write tensors into the model in place, casting to its dtype. A tied head follows the embedding.

    Raises:
        KeyError: the model stores no tensor of that name (a tied head has none of its own).
        ValueError: the shapes differ.
    """
    targets = live.tensors
    for name, tensor in tensors:
        target = targets[name]
        if tensor.shape != target.shape:  # copy_ would broadcast
            raise ValueError(f"{name} has shape {list(target.shape)}, not {list(tensor.shape)}")
        target.copy_(tensor)


def check_live(live: LiveModel) -> None:
    """Refuse a model with NaN or Inf in its weights or in its logits for a short probe.

    Such a model would be scored without a word: at chance, or as perfect where the right answer is always the first.

    Raises:
        NotFiniteError: naming the tensor, or "logits".
    """
    check_weights(live)
    if not all(finite_rows(live, 1)):
        raise NotFiniteError("logits")


@torch.inference_mode()
def check_weights(live: LiveModel) -> None:
    """Refuse a model with NaN or Inf in its weights.

    Raises:
        NotFiniteError: naming the tensor.
    """
    distinct: dict[object, tuple[str, torch.Tensor]] = {}  # a layer that is several hops is looked at once
    for name, tensor in live.tensors.items():
        distinct.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor))
    if (broken := first_not_finite(dict(distinct.values()))) is not None:
        raise NotFiniteError(broken)


@torch.inference_mode()
def finite_rows(live: LiveModel, rows: int) -> list[bool]:
    """Whether the logits for a short probe are finite, in each of so many equal rows."""
    probe = torch.arange(_PROBE_TOKENS, device=live.device) % text_config(live.model.config).vocab_size
    logits = live.model(probe.expand(rows, -1), use_cache=False).logits
    finite: list[bool] = torch.isfinite(logits).flatten(1).all(dim=1).tolist()
    return finite
