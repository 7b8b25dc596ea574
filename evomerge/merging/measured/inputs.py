"""The inputs of sources' layers on calibration texts: Gram matrices and sizes of channels.

A source is run over the texts unchanged, and each linear layer's input is added up: for the tokens' inputs X [tokens,
width], X^T X / tokens [width, width] and the mean of |X| by channel [width]. Layers with the same input tensor, such as
q, k and v, share one entry. The results are kept as evidence, one file per layer of the model, so a candidate only
reads a mapped file; memory holds what a few layers need at a time.

The sizes of channels alone take one pass through the whole model, and are kept in one file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from evomerge.calibration import Calibration
from evomerge.checkpoints.placement import Devices
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.stretch import PassEndsError
from evomerge.errors import InputError
from evomerge.merging.measured.evidence import Evidence, Tensors
from evomerge.merging.site import Ref, Site

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel

_KIND = "layer inputs 1"
_CHANNELS = "channel sizes 1"
_TOKENS = "calibration tokens 1"
_MAX_BYTES = 1 << 29
"""The bytes of Gram matrices that are added up at a time; at least one layer's."""

_OUTSIDE = -1  # instead of a layer's number: linear layers outside the stack, such as an untied head


@dataclass(frozen=True)
class LayerInput:
    """The input statistics of a linear layer, as means over all tokens of the texts.

    Attributes:
        gram: float32 [width, width], of x x^T.
        size: float32 [width], of |x|.
        axis: the weight's dimension of the input: 1 for [out, in], 0 for [in, out] (as in GPT-2).
    """

    gram: Tensor
    size: Tensor
    axis: int


class LinearInputs(Protocol):
    """Provides the inputs of linear layers."""

    def of(self, ref: Ref) -> LayerInput:
        """The input statistics of the layer with this weight. Raises InputError: it cannot be observed."""
        ...


class LayerInputs(LinearInputs, Protocol):
    """Provides the inputs of sources' layers, and the sizes of their channels alone."""

    def channels(self, ref: Ref) -> Tensor | None:
        """The mean of |x| by channel of this layer's input, float32 [width]; None if it cannot be observed."""
        ...


class Inputs:
    """The inputs of sources' layers on some texts: recorded once, then looked up.

    Args:
        sources: by the names that recipes use.
        calibration: the texts.
        evidence: keeps the results.
        devices: where sources are run; several devices share the layers.
    """

    def __init__(
        self, sources: Mapping[str, Source], calibration: Calibration, evidence: Evidence, devices: Devices
    ) -> None:
        self._sources = sources
        self._calibration = calibration
        self._evidence = evidence
        self._devices = devices
        self._recorded: set[str] = set()

    @property
    def digest(self) -> str:
        """The digest of the texts."""
        return self._calibration.digest

    def own_key_of(self, name: str) -> tuple[str, ...]:
        """The digest of the texts of a source's own task.

        Raises:
            InputError: it has none, but shares those of other sources.
        """
        if name not in self._calibration.own:
            problem = f"has no texts of {name}'s own task, that could tell it apart from other experts"
            raise InputError("calibration.sources", problem, "Name a file of prompts of its task for each expert.")
        return self._calibration.key_of(name)

    def of(self, ref: Ref) -> LayerInput:
        """The input statistics of the layer with this weight.

        Raises:
            InputError: it cannot be observed, as for experts that are computed as one.
        """
        name, stored = ref
        source = self._sources[name]
        self.record(name)
        layer = source.roles[stored].layer
        number = _OUTSIDE if layer is None else layer
        kept = self._evidence.get(_KIND, self._key(name, number), lambda: dict(self._run(name, [number]))[number])
        return input_in(kept, source, stored)

    def record(self, name: str) -> None:
        """Run a source over the texts, unless all results are kept already."""
        if name in self._recorded:
            return
        self._recorded.add(name)
        layers = [_OUTSIDE, *range(self._sources[name].layers)]
        if missing := [layer for layer in layers if not self._evidence.has(_KIND, self._key(name, layer))]:
            for layer, made in self._run(name, missing):
                self._evidence.get(_KIND, self._key(name, layer), lambda made=made: made)  # type: ignore[misc]

    def channels(self, ref: Ref) -> Tensor | None:
        """The size of each input channel of a layer; see ``LayerInputs``."""
        name, stored = ref
        return self._channels(name).get(_module(self._sources[name], stored))

    def record_channels(self, name: str) -> None:
        """Run a source over the texts for the sizes of channels, unless these are kept already."""
        self._channels(name)

    def _channels(self, name: str) -> Tensors:
        key = self._evidence.content_of(name), *self._calibration.key_of(name)
        return self._evidence.get(_CHANNELS, key, lambda: self._run_for_channels(name))

    def _key(self, name: str, layer: int) -> tuple[str | int, ...]:
        return self._evidence.content_of(name), layer, *self._calibration.key_of(name)

    def _run(self, name: str, layers: Sequence[int]) -> Iterator[tuple[int, Tensors]]:
        """The inputs of some layers, a few layers at a time."""
        live, tokens = self._live(name)
        source = self._sources[name]
        for group in _groups(live, source, layers):
            passes = (partial(live.model, text, use_cache=False) for text in tokens)
            made = observed(live, source, group, passes)
            for of_layer in made.values():
                _check_finite(of_layer, source)
            yield from made.items()

    def _run_for_channels(self, name: str) -> Tensors:
        made = _channel_sizes(*self._live(name), self._sources[name])
        _check_finite(made, self._sources[name])
        return made

    def _live(self, name: str) -> tuple[LiveModel, list[Tensor]]:
        """A source as a running model, and the tokens of each of its texts."""
        from evomerge.checkpoints.live import live_model, load_weights

        source = self._sources[name]
        live = live_model(source, self._devices)
        load_weights(live, ((tensor, source.read(tensor)) for tensor in source.tensors))
        ids = token_ids(live.tokenizer, self._calibration, name)
        return live, [torch.tensor([text], device=live.device) for text in ids]

    def tokens_of(self, name: str, live: LiveModel, model: str) -> list[Tensor]:
        """The texts of a source as another model reads them: int64 [1, tokens] each.

        They are kept, so that a search can continue, and its candidates be exported, even if the texts are gone.

        Args:
            model: the source of that model's tokenizer.
        """

        def compute() -> Tensors:
            ids = token_ids(live.tokenizer, self._calibration, name)
            return {"tokens": torch.tensor([i for text in ids for i in text]), "counts": torch.tensor([*map(len, ids)])}

        key = (self._evidence.content_of(model), *self._calibration.key_of(name))
        kept = self._evidence.get(_TOKENS, key, compute)
        ends = kept["counts"].cumsum(0)[:-1]
        return [text.view(1, -1) for text in torch.tensor_split(kept["tokens"].to(live.device), ends)]


def _check_finite(made: Tensors, source: Source) -> None:
    """Refuse a source that computes NaN or Inf on its texts, as one may in float16 (InputError)."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in made.values()):
        problem = "computes NaN or Inf in its layers on the calibration texts"
        hint = "float16 ends at 65504: store a model that needs more in bfloat16 or float32."
        raise InputError(source.place, problem, hint)


def token_ids(tokenizer: Any, calibration: Calibration, source: str) -> list[list[int]]:
    """The tokens of each text of a source, up to the limit.

    Raises:
        InputError: the texts cannot be read, or one has no tokens.
    """
    ids = [tokenizer(text)["input_ids"][: calibration.tokens] for text in calibration.texts_of(source)]
    for number, text in enumerate(ids, start=1):
        if not text:
            raise InputError("calibration", f"text {number} of {source} has no tokens", "Give whole sentences.")
    return ids


def input_in(kept: Tensors, source: Source, stored: str) -> LayerInput:
    """The input statistics of a linear layer, from what is kept for its layer of the model.

    Args:
        stored: the name of its weight.

    Raises:
        InputError: it was not observed.
    """
    module = _module(source, stored)
    if f"of.{module}" not in kept:
        raise _unobserved(source, stored)
    entry = int(kept[f"of.{module}"])
    return LayerInput(kept[f"gram.{entry}"], kept[f"size.{entry}"], int(kept[f"axis.{module}"]))


def _unobserved(source: Source, stored: str) -> InputError:
    problem = f"the input of {stored} cannot be observed: it is not a separate linear layer"
    return InputError(source.place, problem, "Use a method that needs no calibration.")


@dataclass
class _Sums:
    """The sums for one layer of the model.

    Attributes:
        entries: for each distinct input: the sums of x x^T [width, width] and |x| [width], and the number of tokens.
        entry_of: for each linear layer's name, the number of its entry.
        axes: of the layers' weights.
        present: the inputs seen in the current pass, kept so that their memory is not reused.
    """

    entries: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    entry_of: dict[str, int] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)
    present: list[tuple[Tensor, int]] = field(default_factory=list)

    def add(self, module: str, given: Tensor) -> None:
        """Add up a linear layer's input [..., width], unless another layer had the same tensor."""
        if not given.numel():
            return  # an expert without tokens
        for tensor, entry in self.present:
            if tensor.data_ptr() == given.data_ptr() and tensor.shape == given.shape:
                self.entry_of.setdefault(module, entry)
                return
        rows = given.detach().reshape(-1, given.shape[-1]).float()
        gram, size = rows.T @ rows, rows.abs().sum(0)
        if module in self.entry_of:
            entry = self.entry_of[module]
            before = self.entries[entry]
            self.entries[entry] = (before[0].add_(gram), before[1].add_(size), before[2] + len(rows))
        else:
            entry = self.entry_of[module] = len(self.entries)
            self.entries.append((gram, size, len(rows)))
        self.present.append((given, entry))

    def result(self) -> Tensors:
        """In the form that is kept: see ``input_in``."""
        kept: dict[str, Tensor] = {}
        for entry, (gram, size, count) in enumerate(self.entries):
            kept |= {f"gram.{entry}": (gram / count).cpu(), f"size.{entry}": (size / count).cpu()}
        for module, entry in self.entry_of.items():
            kept |= {f"of.{module}": torch.tensor(entry), f"axis.{module}": torch.tensor(self.axes[module])}
        return kept


@torch.inference_mode()
def observed(
    live: LiveModel, source: Source, layers: Sequence[int], passes: Iterable[Callable[[], object]]
) -> dict[int, Tensors]:
    """The inputs of the linear layers in some layers of a model, in the form that ``input_in`` reads.

    Args:
        passes: each runs the model on a text.
    """
    sums = {layer: _Sums() for layer in layers}
    with _watched(live, source, sums):
        for run in passes:
            with suppress(PassEndsError):
                run()
            for layer_sums in sums.values():
                layer_sums.present.clear()
    return {layer: layer_sums.result() for layer, layer_sums in sums.items()}


@torch.inference_mode()
def _channel_sizes(live: LiveModel, tokens: Sequence[Tensor], source: Source) -> Tensors:
    """The mean of |x| by input channel of each linear layer of a model on texts, float32 [width] by its name."""
    sums: dict[str, tuple[Tensor, int]] = {}

    def adder(name: str) -> Any:
        def add(module: Any, given: Any) -> None:
            rows = given[0].detach().reshape(-1, given[0].shape[-1])
            if len(rows):  # else an expert without tokens
                total, count = sums.get(name, (0.0, 0))
                sums[name] = total + rows.abs().sum(0, dtype=torch.float64), count + len(rows)

        return add

    modules = [of_layer for layer in _linear(live.model, source).values() for of_layer in layer]
    hooks = [module.register_forward_pre_hook(adder(name)) for name, module, _ in modules]
    try:
        for text in tokens:
            live.model(text, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / count).float().cpu() for name, (total, count) in sums.items()}


@contextmanager
def _watched(live: LiveModel, source: Source, sums: Mapping[int, _Sums]) -> Iterator[None]:
    """Add up the inputs of linear layers while open; passes end after the last of the layers."""
    from evomerge.checkpoints.structure import layer_stack

    hooks = []
    for layer, modules in _linear(live.model, source).items():
        if layer in sums:
            for name, module, axis in modules:
                sums[layer].axes[name] = axis
                hooks.append(module.register_forward_pre_hook(_adder(sums[layer], name)))
    if _OUTSIDE not in sums:
        _, stack = layer_stack(live.model, source.layers)
        hooks.append(stack[max(sums)].register_forward_hook(_stop))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adder(sums: _Sums, name: str) -> Any:
    return lambda module, given: sums.add(name, given[0])


def _stop(module: Any, given: Any, out: Any) -> None:
    raise PassEndsError


def widest_input(source: Source) -> int:
    """The number of inputs of the widest linear layer in a source's stack. Builds its modules without memory.

    Raises:
        InputError: what a matrix in the stack is multiplied with cannot be observed, as in experts that are computed as
            one.
    """
    from evomerge.checkpoints.structure import empty_model, parse_config

    model = empty_model(parse_config(source.config, source.place), source.place)
    linear = {name: (module, axis) for modules in _linear(model, source).values() for name, module, axis in modules}
    widest = 0
    for stored, role in source.roles.items():
        if not Site(stored, role, source.tensors[stored].shape, {}).is_matrix:
            continue
        if _module(source, stored) not in linear:
            raise _unobserved(source, stored)
        module, axis = linear[_module(source, stored)]
        widest = max(widest, module.weight.shape[axis])
    return widest


def _linear(model: Any, source: Source) -> dict[int, list[tuple[str, Any, int]]]:
    """By layer, the linear layers whose weights the source has: name, module, and the weight's axis."""
    from transformers.pytorch_utils import Conv1D

    owners = {_module(source, stored): role.layer for stored, role in source.roles.items()}
    by_layer: dict[int, list[tuple[str, Any, int]]] = {}
    for name, module in model.named_modules():
        if name in owners and isinstance(module, torch.nn.Linear | Conv1D):
            layer = owners[name]
            axis = 0 if isinstance(module, Conv1D) else 1
            by_layer.setdefault(_OUTSIDE if layer is None else layer, []).append((name, module, axis))
    return by_layer


def _module(source: Source, stored: str) -> str:
    """The name of a weight's layer in the model of its source."""
    return source.parts[stored].tensor.removesuffix(".weight")


def _groups(live: LiveModel, source: Source, layers: Sequence[int]) -> Iterator[list[int]]:
    """The layers in groups whose Gram matrices fit into memory; those outside of the stack come last, by themselves."""
    sizes = {
        layer: sum(4 * module.weight.shape[axis] ** 2 for _, module, axis in modules)
        for layer, modules in _linear(live.model, source).items()
    }
    group: list[int] = []
    for layer in sorted(layers):
        if layer == _OUTSIDE:
            continue
        if group and sum(sizes.get(member, 0) for member in (*group, layer)) > _MAX_BYTES:
            yield group
            group = []
        group.append(layer)
    if group:
        yield group
    if _OUTSIDE in layers:
        yield [_OUTSIDE]
