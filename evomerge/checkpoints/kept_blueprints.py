"""An on-disk cache of the blueprints of models, by config.json.

Importing transformers and building a model without memory takes seconds, longer than merging half a billion parameters.
The result depends on config.json, on the names and shapes of the tensors in the files, and on the code, so it is stored
under a hash of these in the user's cache (XDG_CACHE_HOME on Linux).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path
from pydantic import TypeAdapter, ValidationError

from evomerge.checkpoints.blueprint import Blueprint
from evomerge.checkpoints.config import first_line
from evomerge.errors import InputError

_CODE = (
    "blueprint.py", "computing.py", "layered.py", "layout.py", "parts.py", "residual.py", "roles.py", "stacking.py",
    "structure.py",
)  # fmt: skip
"""The files of this folder that determine a blueprint: a change to any of them invalidates the cache."""

_FORM = TypeAdapter(Blueprint)


def blueprint(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> Blueprint:
    """The blueprint for a checked config.json and the tensors of a checkpoint, by name.

    Raises:
        InputError: transformers has no such model, or the tensors do not belong to it.
    """
    kept = user_cache_path("evomerge") / "blueprints" / f"{_key(config, shapes)}.json"
    with suppress(OSError, ValidationError):  # not cached yet, or truncated by a full disk
        return _FORM.validate_json(kept.read_bytes())
    from evomerge.checkpoints.layout import make_blueprint  # imports transformers

    try:
        made = make_blueprint(config, shapes, place)
    except InputError:
        raise
    except Exception as error:  # an unusual value may raise anything inside transformers
        raise InputError(place, f"config.json cannot be used: {first_line(error)}") from error
    with suppress(OSError):  # a read-only home only costs time
        kept.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=kept.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(_FORM.dump_json(made))
        Path(unfinished).rename(kept)
    return made


def _key(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    code = [(Path(__file__).parent / name).read_text("utf-8") for name in _CODE]
    content = [metadata.version("transformers"), code, config, sorted(shapes.items())]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
