"""What transformers knows about a model, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from evomerge.checkpoints.layered import LayerSetting
from evomerge.checkpoints.parts import Fold, Part
from evomerge.recipes.stack import Role


@dataclass(frozen=True)
class Blueprint:
    """A model, and where its tensors are in a checkpoint.

    Attributes:
        layers: number of layers in the stack.
        text_type: the model type of the text model, which may be the whole model.
        settings: values of the parsed configuration that determine what the weights mean; ``depth`` is the key in
            config.json of the number of layers.
        layered: settings that differ between layers, by their keys.
        computing: settings that change what the model computes; see ``computing_settings``.
        image_settings: for a model that reads images, the settings of that, such as the number of tokens per image.
        reordering_problem: why layers cannot be moved to other positions; empty if they can.
        parts: the tensors that transformers writes for this model, by name, in the order of its modules. In a model
            that also reads images, tensors of the text model have the names that they would have in that model alone.
        written: for a model that also reads images, the name under which transformers writes each of them.
        ignored: patterns of tensor names that transformers ignores when it loads the model.
        roles: the role of each of ``parts``.
        shapes: the shape of each of ``parts``.
        located: for each part the checkpoint's tensor that holds it; also for whole tensors that are not in ``parts``.
        copies: second copies of tied tensors in the checkpoint, with the name of the tensor that they must equal.
        tied: names of the tensors that the model uses in two places.
        float32: for each 16-bit dtype of the model, the names of tensors that are float32 all the same.
        head: names of the tensors that belong to the head only.
        transposed: names of the weights that are stored as inputs by outputs.
        folds: how a factor on the output of a layer is folded into its tensors; empty if that is unknown.
        normed: layers read the residual stream through norms, so its scale does not affect them.
    """

    layers: int
    text_type: str
    settings: dict[str, Any]
    layered: dict[str, LayerSetting]
    computing: dict[str, str]
    image_settings: dict[str, str]
    reordering_problem: str
    parts: dict[str, Part]
    written: dict[str, str]
    ignored: tuple[str, ...]
    roles: dict[str, Role]
    shapes: dict[str, tuple[int, ...]]
    located: tuple[tuple[Part, str], ...]
    copies: dict[str, str]
    tied: frozenset[str]
    float32: dict[str, frozenset[str]]
    head: frozenset[str]
    transposed: frozenset[str]
    folds: dict[str, Fold]
    normed: bool

    def ignores(self, name: str) -> bool:
        """Whether transformers ignores a tensor of this name, which does not belong to the model, when it loads it."""
        return any(re.search(pattern, name) for pattern in self.ignored)
