"""What transformers knows of a model, as data: drawn once for a config.json and kept on disk.

Importing transformers and building a model without memory takes seconds, longer than merging half a billion
parameters. What comes of it follows from config.json, from the names and shapes of the tensors in the files, and from
the code, so it is kept under a hash of these in the user's cache (XDG_CACHE_HOME on Linux).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path
from pydantic import TypeAdapter, ValidationError

from evomerge.checkpoints.config import first_line
from evomerge.checkpoints.layered import LayerSetting
from evomerge.checkpoints.parts import Fold, Part
from evomerge.errors import InputError
from evomerge.recipes.stack import Role

_CODE = (
    "blueprint.py", "differences.py", "layered.py", "layout.py", "parts.py", "residual.py", "roles.py", "stacking.py",
    "structure.py",
)  # fmt: skip
"""The files of this folder that a blueprint follows from: a change in one of them makes new ones."""


@dataclass(frozen=True)
class Blueprint:
    """A model and where its tensors are in a checkpoint.

    Attributes:
        layers: number of layers in the stack.
        settings: values of the parsed configuration that say what its weights mean; ``depth`` names the key of
            config.json that holds the number of layers.
        layered: what the configuration says of single layers, by its key.
        computing: what the configuration says that changes what the model computes; see ``computing_settings``.
        rigid: why layers cannot stand in other places than their own; empty where they can.
        parts: the tensors that transformers writes for this model, in the order of its modules.
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
    settings: dict[str, Any]
    layered: dict[str, LayerSetting]
    computing: dict[str, str]
    rigid: str
    parts: dict[str, Part]
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


_FORM = TypeAdapter(Blueprint)


def blueprint(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> Blueprint:
    """The blueprint of a checked config.json and the tensors of a checkpoint, by name.

    Raises:
        InputError: transformers has no such model, or the tensors are not its own.
    """
    kept = user_cache_path("evomerge") / "blueprints" / f"{_key(config, shapes)}.json"
    with suppress(OSError, ValidationError):  # not there yet, or cut short by a full disk
        return _FORM.validate_json(kept.read_bytes())
    from evomerge.checkpoints.layout import draw  # which imports transformers

    try:
        drawn = draw(config, shapes, place)
    except InputError:
        raise
    except Exception as error:  # whatever a strange value does inside transformers
        raise InputError(place, f"config.json cannot be used: {first_line(error)}") from error
    with suppress(OSError):  # a home that cannot be written to costs time alone
        kept.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=kept.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(_FORM.dump_json(drawn))
        Path(unfinished).rename(kept)
    return drawn


def _key(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    code = [(Path(__file__).parent / name).read_text("utf-8") for name in _CODE]
    content = [metadata.version("transformers"), code, config, sorted(shapes.items())]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
