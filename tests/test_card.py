"""The model card: what it calls a merge, what it calls sources, and what it keeps to itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers_miniature import MINIATURES

from evomerge.checkpoints.source import Source, open_source
from evomerge.files import absolute_reference
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.report.card import papers
from evomerge.report.public_names import hub_ids, movable, public_name, without_places
from evomerge.report.unmerged import unmerged_source


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    return {name: open_source(name, str(MINIATURES / name), place="sources") for name in ("base", "maths")}


def recipe(sources: Mapping[str, Source], blend: Blend) -> StackRecipe:
    references = {name: source.reference for name, source in sources.items()}
    return StackRecipe.uniform(blend, sources=references, tokenizer="base", layers=sources["base"].layers)


def linear(**weights: float) -> Blend:
    return Blend(method="linear", sources=tuple(weights), parameters={"weight": weights, "normalize": False})


PASSED = Blend(method="passthrough", sources=("maths",), parameters={"scale": {"maths": 1.0}})
VECTOR = Blend(method="task_arithmetic", sources=("maths",), base="base", parameters={"weight": {"maths": 1.0}})


@pytest.mark.parametrize(
    ("blend", "alone"),
    [(linear(maths=1.0), "maths"), (PASSED, "maths"), (linear(maths=0.5), ""), (linear(maths=0.5, base=0.5), ""),
     (VECTOR, "")],
)  # fmt: skip
def test_a_source_alone_is_never_called_a_merge(sources: dict[str, Source], blend: Blend, alone: str) -> None:
    made = recipe(sources, blend)
    assert unmerged_source(made, {name: source.layers for name, source in sources.items()}) == alone
    card = papers("model", made, sources, None)["README.md"]
    front = yaml.safe_load(card.split("---")[1])
    assert ("A merge of" in card) == (not alone)
    assert ("merge" in front["tags"]) == (not alone)
    assert ("unmerged" in card) == bool(alone)


def test_a_card_has_no_place_of_this_machine_and_no_base_model_that_is_none(sources: dict[str, Source]) -> None:
    texts = papers("model", recipe(sources, linear(maths=0.5, base=0.5)), sources, None)
    for name in ("README.md", "lineage.json"):
        assert str(MINIATURES) not in texts[name]
        assert "/" not in texts[name].split("| maths |")[-1].split("|")[0]
    assert "base_model" not in yaml.safe_load(texts["README.md"].split("---")[1])


@pytest.mark.parametrize(
    ("blend", "words"),
    [
        (linear(maths=0.5, base=0.5), "A merge of 2 language models, made"),
        (VECTOR, "A merge of one language model on `base`, its base, made"),
    ],
)
def test_a_base_that_changes_are_taken_against_is_none_of_those_merged(
    sources: dict[str, Source], blend: Blend, words: str
) -> None:
    assert words in papers("model", recipe(sources, blend), sources, None)["README.md"]


def test_a_recipe_on_this_machine_is_valid_wherever_its_folder_is_moved(
    tmp_path: Path, sources: dict[str, Source]
) -> None:
    texts = papers("model", recipe(sources, linear(maths=0.5, base=0.5)), sources, None)
    references = yaml.safe_load(texts["recipe.yaml"])["sources"]
    for folder in (tmp_path, tmp_path / "deep/in/there", Path("/")):
        for name, reference in references.items():
            assert absolute_reference(reference, folder) == str((MINIATURES / name).resolve())
    assert "elsewhere, name yours" in texts["README.md"]
    assert str(MINIATURES.resolve()) not in texts["README.md"] + texts["lineage.json"]


def test_a_recipe_for_elsewhere_names_hub_ids_and_folders_without_their_places(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--model" / "snapshots" / "0123abcd"
    adapter, made = tmp_path / "lora", tmp_path / "made"
    for folder in (snapshot, adapter, made):
        folder.mkdir(parents=True)
    references = {"a": str(snapshot), "b": f"org/other@v1+{adapter}", "c": str(made)}
    plain = StackRecipe.uniform(linear(a=0.5, b=0.25, c=0.25), sources=references, tokenizer="a", layers=1)
    moved = movable(plain, stays=False)
    assert moved.sources == {"a": "org/model@0123abcd", "b": "org/other@v1+lora", "c": "made"}
    assert moved.hash == plain.hash


@pytest.mark.parametrize(
    ("reference", "name", "ids"),
    [
        ("org/model@v1.0", "org/model@v1.0", ["org/model"]),
        ("org/model+you/lora", "org/model+you/lora", ["org/model", "you/lora"]),
        ("/data/models/base+/data/adapters/maths", "base+maths", []),
        ("org/model+/data/adapters/maths", "org/model+maths", ["org/model"]),
        ("/hub/models--org--model/snapshots/0123abcd", "org/model", ["org/model"]),
    ],
)
def test_models_are_called_what_others_know_them_by(
    sources: dict[str, Source], reference: str, name: str, ids: list[str]
) -> None:
    source = replace(sources["base"], reference=reference)
    assert (public_name(source), hub_ids(source)) == (name, ids)


def test_settings_keep_names_and_no_places(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").touch()
    told = {"file": str(tmp_path / "items.jsonl"), "prompt": "/no such place", "files": [str(tmp_path)], "items": 3}
    found = without_places(told)
    assert found == {"file": "items.jsonl", "prompt": "/no such place", "files": [tmp_path.name], "items": 3}


def test_a_recipe_is_said_in_runs_of_layers() -> None:
    first, second = linear(a=0.25, b=0.75), linear(a=1.0, b=0.0)
    hops = [(i, each, each, each) for i, each in enumerate([first] * 10 + [second] + [first] * 2)]
    made = StackRecipe.compose(
        sources={"a": "a", "b": "b"}, tokenizer="a", embedding=second, hops=hops, norm=second, head=second
    )
    assert made.lines() == [
        "embedding; norm; head; layer 10: linear of a, b; weight a 1, b 0",
        "layers 0 to 9, 11 to 12: linear of a, b; weight a 0.25, b 0.75",
    ]
