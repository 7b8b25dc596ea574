"""What transformers knows of a model, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from evomerge.checkpoints.layered import LayerSetting
from evomerge.checkpoints.parts import Fold, Part
from evomerge.recipes.stack import Role


@dataclass(frozen=True)
class Blueprint:
    """A model and where its tensors are in a checkpoint.

    Attributes:
        layers: number of layers in the stack.
        text_type: the model type of what goes on with a text; that of the model, where that is all of it.
        settings: values of the parsed configuration that say what its weights mean; ``depth`` names the key of
            config.json that holds the number of layers.
        layered: what the configuration says of single layers, by its key.
        computing: what the configuration says that changes what the model computes; see ``computing_settings``.
        seeing: of a model that reads images, what it says of that: how many tokens they become, say.
        rigid: why layers cannot stand in other places than their own; empty where they can.
        parts: the tensors that transformers writes for this model, in the order of its modules. Those of a model that
            reads images as well are called as in the model of texts alone that goes on with its texts, where they are
            of that.
        written: of a model that reads images as well, what transformers writes each of them as.
        ignored: patterns of the names that transformers passes over when it loads the model.
        roles: the role of each of them.
        shapes: the shape of each of them.
        located: the checkpoint's tensor that each part is in; also parts that are not among ``parts``, as a whole.
        copies: second copies of tied tensors in the checkpoint, with the name of what they must be equal to.
        tied: names of the tensors that the model uses in two places.
        float32: names of the tensors that are float32 in a model of another dtype, by the name of that.
        head: names of the tensors that are the head's own.
        turned: names of the weights that are stored as inputs by outputs.
        folds: how a factor on what a layer adds to the residual stream goes into its tensors; empty where nobody knows.
        normed: layers read the stream through norms, so that its size does not matter to them.
    """

    layers: int
    text_type: str
    settings: dict[str, Any]
    layered: dict[str, LayerSetting]
    computing: dict[str, str]
    seeing: dict[str, str]
    rigid: str
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
    turned: frozenset[str]
    folds: dict[str, Fold]
    normed: bool

    def passes_over(self, name: str) -> bool:
        """Whether transformers passes over a tensor of that name, which is none of the model's, when it loads it."""
        return any(re.search(pattern, name) for pattern in self.ignored)
