"""Locates the model that a reference names: a local folder, a model on the Hugging Face hub, or one at a URL."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from evomerge.checkpoints.local_copy import local_copy
from evomerge.errors import InputError
from evomerge.files import GGUF, is_path, split_expert
from evomerge.objects import is_url

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_HUB_COPIES = ["*/*", "consolidated*"]  # second copies of the weights in another layout


def split_reference(reference: str, root: Path | None) -> list[str]:
    """Split ``model+adapter+...`` into model and adapters. A folder with a plus in its name is not split."""
    alone = not is_path(reference) or os.path.isdir(_local(reference, root))
    return [reference] if alone else reference.split("+")


def is_hub_id(reference: str, root: Path | None) -> bool:
    """Whether a reference to one model is looked up on the hub, because there is no local folder of that name."""
    here = os.path.exists(_local(reference, root)) or reference.startswith(".")
    return not here and _HUB_ID.fullmatch(reference) is not None


def find_folder(reference: str, place: str, root: Path | None, files: Sequence[str] = _HUB_FILES) -> Path:
    """The folder of a model or an adapter, with those of its ``files`` that exist; downloaded if it is on the hub, or
    copied if a URL names it. For one of several experts (`folder#3`) it is the folder of all.

    Raises:
        InputError: there is none, or the hub denies access.
    """
    if not reference:
        raise InputError(place, "a reference has nothing before or after its plus", "Write `MODEL+ADAPTER`.")
    reference, _ = split_expert(reference, root)
    if not is_path(reference):
        raise InputError(place, f"{reference!r} holds a character that no name of a file can have")
    if is_url(reference):
        return local_copy(reference, place, files)
    local = _local(reference, root)
    if os.path.isdir(local):  # unlike Path.is_dir, returns False for a name that is too long
        return local
    if os.path.exists(local):
        if local.suffix == GGUF:
            from evomerge.checkpoints.gguf_file import gguf_folder  # imports torch

            return gguf_folder(local, place)
        hint = "Name the folder that holds the model; other tensors are searched by `kind: state_dict`, not in stages."
        raise InputError(place, f"{local} is a file", hint)
    hub = _HUB_ID.fullmatch(reference)
    if hub is None or reference.startswith("."):
        raise InputError(
            place, f"there is no folder {local}", "Give a model's folder, org/name of one on the hub, or a URL."
        )
    return _download(hub["id"], hub["revision"], files, local, place)


def _local(reference: str, root: Path | None) -> Path:
    return Path(os.path.join(root or Path(), os.path.expanduser(reference)))


def _download(repository: str, revision: str | None, files: Sequence[str], local: Path, place: str) -> Path:
    # The hub's own error messages contain addresses and request ids, so they are rewritten.
    which = repository + (f" at revision {revision}" if revision else "")
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=[*files], ignore_patterns=_HUB_COPIES)
        )
    except GatedRepoError:
        problem = f"{which} is gated on the hub, and this machine's token may not read it"
        hint = "Ask for access on its page, then run `hf auth login`."
    except RevisionNotFoundError:
        problem, hint = f"{repository} has no revision {revision!r} on the hub", "Name a branch, a tag or a commit."
    except (RepositoryNotFoundError, HFValidationError):
        problem = f"there is neither a folder {local} nor a model {repository} on the hub"
        hint = "Check the spelling; for a private model run `hf auth login`."
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError):
        problem = f"there is no folder {local}, and {which} is not in the hub's cache and the hub cannot be reached"
        hint = "Check the spelling and the network, or download the model on another machine."
    except Exception as error:  # a lost connection may raise errors of many libraries
        problem, hint = f"{which} could not be downloaded ({type(error).__name__})", "Try again later."
    raise InputError(place, problem, hint)
