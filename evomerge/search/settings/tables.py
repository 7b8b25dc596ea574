"""Searches over tables of tensors: their sources, and which keys of a search file are only for language models."""

from __future__ import annotations

from pathlib import Path

from evaluators.function import FunctionSettings
from evomerge.errors import InputError
from evomerge.raw.references import is_table
from evomerge.search.settings.search_file import SearchFile
from search_spaces.state_dict_space import StateDictSpaceSettings

_HINT = "Leave it out."


def check_is_table(reference: str, place: str) -> None:
    """Refuse a reference to anything but a file of tensors or a folder of diffusers. Raises InputError."""
    from evomerge.raw.table import open_table  # which imports torch

    if not is_table(reference, Path()):
        problem = f"{reference} is neither a file of tensors (.safetensors) nor a folder of diffusers"
        raise InputError(place, problem, "Name one, or search over models of transformers: `kind: parameter_space`.")
    open_table(place, reference, Path(), place)


def table_names(reference: str, place: str) -> tuple[str, ...]:
    """The names of a table's floating-point tensors. Raises InputError: the table cannot be opened."""
    from evomerge.raw.table import open_table

    return tuple(open_table(place, reference, Path(), place).source.tensors)


def check_table_search(file: SearchFile) -> None:
    """Refuse keys that do not work with tables of tensors, or that only work with these.

    Raises:
        InputError: naming the key of the search file.
    """
    of_tables = isinstance(file.space, StateDictSpaceSettings)
    for place, settings in file.evaluators().items():
        takes = isinstance(settings, FunctionSettings) and settings.given == "weights"
        if of_tables and not takes:
            problem = "asks a model, and a table of tensors cannot answer"
            hint = "Score it by a function of yours: `evaluator: python`, `given: weights`."
            raise InputError(f"{place}.evaluator", problem, hint)
        if takes and not of_tables:
            problem = "is weights, and only candidates of a space of `kind: state_dict` are written to disk"
            raise InputError(f"{place}.given", problem, _HINT)
    if not of_tables:
        return
    named = {"calibration": file.calibration, "fit": file.fit, "select": file.select, "proxy": file.proxy}
    for key, section in named.items():
        if section is not None:
            raise InputError(key, "is for language models, and these are tables of tensors", _HINT)
    if file.together > 1:
        raise InputError("together", f"is {file.together}, and tables of tensors are scored one by one", _HINT)
    if file.cluster.devices > 1:
        raise InputError("cluster.devices", "is for models that run on several GPUs, and tables do not run", _HINT)
    if file.vocabulary.kind != "same" or file.vocabulary.aligns:
        raise InputError("vocabulary", "is about tokens, and tables of tensors have none", _HINT)
