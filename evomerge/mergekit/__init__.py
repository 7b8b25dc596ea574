"""Recipe files: our own YAML, and reading and writing that of mergekit (https://github.com/arcee-ai/mergekit, 0.1.5).

Differences in results for equal settings:

* DARE draws different masks from mergekit, and rescales by 1 / density where mergekit restores the L1 norm of each
  tensor. The seed of the masks is not part of mergekit's file (``--random-seed``).
* Sums are computed in float32 and rounded once; mergekit computes in ``dtype``. So ``dtype: float32`` is written, with
  the recipe's dtype as ``out_dtype``, unless the recipe leaves the dtype to its tokenizer's source.
* TIES keeps every element as large as the k-th largest; mergekit keeps exactly k.

Unlike mergekit, we reject unknown keys, values of the wrong kind, empty lists and layers that a model does not have.
``modules:``, ``override_architecture`` and non-default constants of the methods (``eps``, ``max_iter``, ``tol``) are
not supported. ``int8_mask`` has no effect, like all settings that task arithmetic does not use.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from evomerge.errors import InputError
from evomerge.files import read_text
from evomerge.mergekit.reading import Roles, from_mergekit
from evomerge.mergekit.stages import Made, read_stages
from evomerge.mergekit.writing import to_mergekit
from evomerge.recipes.base import Recipe, recipe_kind
from evomerge.yaml import dump_yaml, load_documents

__all__ = ["dump_recipe", "from_mergekit", "load_recipe_file", "to_mergekit"]


def load_recipe_file(path: Path, look: Callable[[str], Roles], made: Made | None = None) -> Recipe:
    """Read a recipe from YAML: ours (as written by ``dump_recipe``) or one or more mergekit configurations.

    Args:
        look: returns the roles of a model's tensors (``Source.roles``), by its reference; only used for mergekit files.
        made: as for ``read_stages``, if a file of several merges is allowed.

    Raises:
        InputError: the file cannot be read, is neither, or describes something that no recipe can represent.
    """
    if not path.exists():
        raise InputError(str(path), "cannot be read as a recipe (there is no such file)")
    documents = load_documents(read_text(path, str(path)), str(path))
    if len(documents) > 1:
        if made is None:
            raise InputError(str(path), "holds several merges, and one is wanted", "Give the last one alone.")
        return read_stages(documents, look, made, str(path))
    content = documents[0] if documents else None
    if isinstance(content, dict) and ("blends" in content or "kind" in content):
        try:
            return recipe_kind(content, str(path)).model_validate(content)
        except ValidationError as error:
            raise _explain(error, path) from None
    if isinstance(content, dict) and "merge_method" in content:
        content = {key: value for key, value in content.items() if key != "name"}  # used only with several merges
        return from_mergekit(content, look, str(path))
    raise InputError(str(path), "is not a recipe: it has neither `blends:` nor, as mergekit's have, `merge_method:`")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as readable YAML; ``load_recipe_file`` returns an equal recipe."""
    return f"# Evomerge recipe {recipe.hash}\n" + dump_yaml(recipe.model_dump(mode="json", exclude_none=True))


def _explain(error: ValidationError, path: Path) -> InputError:
    """One fault of a recipe file; a misspelt key is reported as such, not as a missing key."""
    faults = error.errors(include_url=False)
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    where = ".".join(str(part) for part in fault["loc"])
    unknown = fault["type"] == "extra_forbidden"
    problem = "is not a key of a recipe" if unknown else fault["msg"].removeprefix("Value error, ")
    return InputError(f"{path}: {where}" if where else str(path), problem)
