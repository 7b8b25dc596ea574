"""The inputs of sources' layers behind the merged layers before them, one layer of the model after another.

A method that ``needs`` "merged_inputs" makes a layer from the inputs that every source's layer gets once all layers
before it are merged (RegMean++). So layers are made in order, in the live model itself: the layer of a source is
written in the place of the merged one, the hidden states of the source's texts pass through it, and its linear layers
are observed. After all sources, the merged layer is written there, and the hidden states pass through it. So a
candidate runs each layer once for every source and once for the merge; memory holds the hidden states of all texts, and
the Gram matrices of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evomerge.checkpoints.source import Source
from evomerge.merging.measured.evidence import Tensors
from evomerge.merging.measured.inputs import Inputs, LayerInput, input_in, observed
from evomerge.merging.site import Ref

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel

CopyLayer = Callable[[str, int], None]
"""(source, layer) -> nothing: writes the unchanged layer of a source over that of the live model."""


class MergedInputs:
    """The inputs of one layer of sources after another, for one recipe.

    Args:
        live: the model that is being made. Everything outside its layers is written, and these are in their places.
        sources: by the names that recipes use.
        model: the source that gave the live model its structure.
        mixed: the sources whose layers are observed.
        inputs: has the texts.
        copy_layer: see ``CopyLayer``.
    """

    def __init__(
        self,
        live: LiveModel,
        sources: Mapping[str, Source],
        model: str,
        mixed: Sequence[str],
        inputs: Inputs,
        copy_layer: CopyLayer,
    ) -> None:
        from evomerge.checkpoints.stretch import Stretches
        from evomerge.checkpoints.structure import layer_stack

        self._live = live
        self._model = sources[model]
        self._copy_layer = copy_layer
        self._stretches = Stretches(live.model, list(layer_stack(live.model, self._model.layers)[1]))
        self._texts = {name: inputs.tokens_of(name, live, model) for name in mixed}
        self._at = 0
        self._hidden: dict[str, list[Tensor | None]] = {name: [None] * len(t) for name, t in self._texts.items()}
        self._observed: dict[str, Tensors] = {}

    def observe(self, layer: int) -> None:
        """Make the inputs of a layer available to ``of``. All layers before it are written; its own content is lost.

        Raises:
            NotFiniteError: the merged layers before it give NaN or Inf.
        """
        self._go_to(layer)
        self._observed = {}
        for name, texts in self._texts.items():
            self._copy_layer(name, layer)
            passes = (
                partial(self._stretches.run, text, layer, hidden)
                for text, hidden in zip(texts, self._hidden[name], strict=True)
            )
            self._observed[name] = observed(self._live, self._model, [layer], passes)[layer]

    def of(self, ref: Ref) -> LayerInput:
        """The input statistics of the layer with this weight, in the model's layer that was observed last.

        Raises:
            InputError: it cannot be observed.
        """
        name, stored = ref  # the source that gave the structure uses the same name, whatever its modules are called
        return input_in(self._observed[name], self._model, stored)

    @torch.inference_mode()
    def _go_to(self, layer: int) -> None:
        """Pass the hidden states of all texts through the merged layers before this one."""
        from evomerge.checkpoints.live import NotFiniteError

        if layer == self._at:
            return
        for name, texts in self._texts.items():
            kept = self._hidden[name]
            for number, text in enumerate(texts):
                reached = self._stretches.reach(text, self._at, kept[number], layer)
                if not torch.isfinite(reached).all():
                    raise NotFiniteError(f"what layer {layer} is given on the texts of {name}")
                kept[number] = reached
        self._at = layer
