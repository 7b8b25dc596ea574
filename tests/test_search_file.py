"""Search files: what parses, what is refused, and that each refusal names the place and the hint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from evomerge.errors import InputError
from evomerge.search.preparing.evaluators import Evaluators
from evomerge.search.settings.resuming import resumed_file
from evomerge.search.settings.search_file import SearchFile, load_search_file, parse_search_file
from evomerge.store import Store

GOOD = """
name: example
sources: {base: models/base, maths: models/maths, japanese: org/japanese@main}
base: base
space: {kind: parameter_space, method: task_arithmetic, bounds: {weight: [0, 2]}}
objectives:
  maths: {task: mini_math_ja, metric: acc_ja}
  translation: {task: mini_translate_ja, metric: acc, items: 100}
optimizer: {name: nsga2}
budget: {candidates: 40}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "maths").mkdir()
    file = tmp_path / "search.yaml"
    file.write_text(GOOD)
    return file


def test_a_good_file(path: Path) -> None:
    file = load_search_file(path)
    assert file.sources == {
        "base": str(path.parent / "models" / "base"),
        "maths": str(path.parent / "models" / "maths"),
        "japanese": "org/japanese@main",
    }
    assert file.tokenizer_source == "base"
    assert [s.task for s in file.evaluators().values()] == ["mini_math_ja", "mini_translate_ja"]  # type: ignore[attr-defined]


def test_it_survives_a_round_trip_through_json(path: Path) -> None:
    file = load_search_file(path)
    again = SearchFile.model_validate(file.model_dump(mode="json"))
    assert again == file
    assert again.model_dump(mode="json") == file.model_dump(mode="json")


def test_a_race_that_an_earlier_version_recorded_goes_on(path: Path) -> None:
    """It recorded how challengers are chosen, of which one way is left: a search that chose the other is refused."""
    path.write_text(path.read_text() + "racing: {rungs: [25]}\n")
    settings = load_search_file(path).model_dump(mode="json")
    settings["racing"] |= {"challengers": "scores"}
    with Store.create(
        path.parent / "search.db", name="demo", settings=settings, fingerprints={}, environment={}
    ) as store:
        assert resumed_file(path.parent, store, ()).racing == load_search_file(path).racing
    with pytest.raises(InputError, match=r"racing\.challengers"):
        load_search_file(path, ["racing.challengers=neighbours"])


def test_settings_that_this_version_does_not_know_are_refused_by_name(path: Path) -> None:
    """A key may be gone since a search began; its store is at fault then, and not the file that a person may edit."""
    settings = load_search_file(path).model_dump(mode="json")
    settings["budget"] |= {"weeks": 3}
    store = Store.create(path.parent / "search.db", name="demo", settings=settings, fingerprints={}, environment={})
    with store, pytest.raises(InputError, match="recorded by another version of Evomerge") as refused:
        resumed_file(path.parent, store, ())
    assert refused.value.place == f"{path.parent}: the settings recorded in the store: budget.weeks"


def test_overrides_are_yaml_values_at_key_paths(path: Path) -> None:
    file = load_search_file(
        path, ["budget.candidates=7", "pool=ray", "cluster.workers=2", "objectives.maths.items=20", "seed=3"]
    )
    assert (file.budget.candidates, file.pool, file.cluster.workers, file.seed) == (7, "ray", 2, 3)
    assert file.objectives["maths"].items == 20


def test_the_longest_attempt_is_a_day_unless_said_and_never_under_a_minute(path: Path) -> None:
    assert load_search_file(path).attempt_hours == 24
    assert load_search_file(path, ["attempt_hours=0.5"]).attempt_hours == 0.5
    for hours in ("0", "-3", "0.01", ".inf", ".nan"):
        with pytest.raises(InputError, match=r"search\.yaml: attempt_hours"):
            load_search_file(path, [f"attempt_hours={hours}"])
    with pytest.raises(
        InputError, match=r"must be 0.0167 or more: no attempt of less than a minute .* \(given: 0.01\)"
    ):
        load_search_file(path, ["attempt_hours=0.01"])


def test_each_evaluator_is_opened_once_for_all_that_name_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load(GOOD) | {
        "objectives": {"size": {"evaluator": "cost", "metric": "parameters", "direction": "minimize"}},
        "constraints": {"deep": {"evaluator": "cost", "metric": "layers", "at_most": 9}},
        "features": {
            "long": {"evaluator": "cost", "metric": "layers", "answer": 3, "range": [1, 9]},
            "lost": {"evaluator": "cost", "metric": "layer", "range": [1, 9]},
            "many": {"evaluator": "cost", "metric": "layers", "items": 7, "range": [1, 9]},
        },
    }
    file = parse_search_file(content, place="search.yaml", root=path.parent)
    read: list[str] = []
    evaluators = SearchFile.evaluators
    monkeypatch.setattr(SearchFile, "evaluators", lambda self: (read.append(self.name), evaluators(self))[1])
    opened = Evaluators.open(file)
    assert list(opened.named) == ["objectives.size", "features.long"]
    assert opened.resolve(file, "objectives.size") == (0, False, 1)
    assert opened.resolve(file, "constraints.deep").evaluator == 0
    assert opened.resolve(file, "features.long").evaluator == 1
    with pytest.raises(InputError, match=r"features\.lost\.metric: there is no metric 'layer'"):
        opened.resolve(file, "features.lost")
    with pytest.raises(InputError, match=r"features\.many\.items: asks for 7 of 1 items"):
        opened.resolve(file, "features.many")
    assert read == ["example"]


def test_equal_evaluator_settings_are_equal(path: Path) -> None:
    file = load_search_file(path, ["objectives.right={task: mini_math_ja, metric: acc}"])
    settings = file.evaluators()
    assert settings["objectives.maths"] == settings["objectives.right"] != settings["objectives.translation"]


@pytest.mark.parametrize(
    ("override", "place", "words"),
    [
        ("budgets.candidates=4", "search.yaml: budgets", "Did you mean 'budget'?"),
        ("budget.candidate=4", "search.yaml: budget.candidate", "Did you mean 'candidates'?"),
        ("budget.candidates=0", "search.yaml: budget.candidates", "greater than 0"),
        ("budget.candidates=many", "search.yaml: budget.candidates", "must be a whole number (given: 'many')"),
        ("budget={}", "search.yaml: budget", "needs candidates, hours, patience or cost"),
        ("seed=-1", "search.yaml: seed", "greater than or equal to 0"),
        ("sources={only: x}", "search.yaml: sources", "needs at least 2, has 1"),
        ("base=nobody", "search.yaml", "there is no source 'nobody'; the sources are base, maths, japanese"),
        ("sources.a b=x", "search.yaml: sources.a b", "may hold letters, digits, - and _ (up to 64)"),
        (f"name={'x' * 65}", "search.yaml: name", "is longer than 64 characters"),
        ("name=7", "search.yaml: name", "must be text, but YAML reads it as the number 7. Put it in quotes."),
        ("sources={" + ", ".join(f"s{i}: x" for i in range(257)) + "}", "search.yaml: sources", "has more than 256"),
        ("sources=[a, b]", "search.yaml: sources", "must be a section with keys"),
        ("task_folders=here", "search.yaml: task_folders", "must be a list"),
        ("racing={rungs: [a]}", "search.yaml: racing.rungs.0", "must be a whole number"),
        ("attempt_hours=long", "search.yaml: attempt_hours", "must be a number"),
        ("allow_task_code=maybe", "search.yaml: allow_task_code", "must be true or false"),
        ("pool=slurm", "search.yaml: pool", "'in_process' or 'ray'"),
        ("space.kind=parameters", "space.kind", "Did you mean 'parameter_space'?"),
        ("space.granularity=rows", "search.yaml: space.granularity", "'adaptive' or a whole number (given: 'rows')"),
        ("budget.hours=1:30", "search.yaml: budget.hours", "must be a number (given: '1:30')"),
        ("budget.hours=.inf", "search.yaml: budget.hours", "is inf; no number here is infinite"),
        ("budget.candidates=100000000", "search.yaml: budget.candidates", "less than or equal to 10000000"),
        ("seed=99999999999999999999", "search.yaml: seed", "a whole number of 20 digits"),
        ("confirm.top=9223372036854775808", "search.yaml: confirm.top", "a whole number of 19 digits"),
        ("confirm.drawn=1000000000", "search.yaml: confirm.drawn", "less than or equal to"),
        ("cluster.cpus_per_worker=1000000000", "search.yaml: cluster.cpus_per_worker", "less than or equal to 4096"),
        ("cluster.gpus_per_worker=.nan", "search.yaml: cluster.gpus_per_worker", "is nan; no number here is infinite"),
        ("cluster.workers=1000000000", "search.yaml: cluster.workers", "less than or equal to 100000"),
        ("attempts=1000000", "search.yaml: attempts", "less than or equal to 1000"),
        ("together=1000000", "search.yaml: together", "less than or equal to 1024"),
        ("optimizer.restarts=1000000", "search.yaml: optimizer", "restarts"),
        ("constraints.c={task: x, metric: m, at_least: .nan}", "search.yaml: constraints.c.at_least", "is nan"),
        ("objectives.maths.generation={temperature: [1, .inf]}", "generation.temperature.1", "is inf"),
        ("objectives.maths.batch_size=1000000000000000", "objectives.maths.batch_size", "a whole number of 16 digits"),
        ('base="a\\0b"', "search.yaml: base", "holds a null character"),
        ('sources.maths="a\\0b"', "search.yaml: sources.maths", "holds a null character"),
        ("space.metod=ties", "search.yaml: space.metod", "Did you mean 'method'?"),
        ("space.kind=parametric", "search.yaml: space.kind", "there is no search space 'parametric'"),
        ("objectives.maths.batch_size=0", "objectives.maths.batch_size", "1 or 'auto' (given: 0)"),
        ("cluster.workers={min: 2}", "search.yaml: cluster.workers.max", "is missing"),
        ("cluster.workers=none", "search.yaml: cluster.workers", "must be a whole number or a section with keys"),
        ("name=no", "search.yaml: name", "YAML reads it as false, as it does yes, no, on and off. Put it in quotes."),
        ("base=2024-01-01", "search.yaml: base", "YAML reads it as a date. Put it in quotes."),
        ("base={question}", "search.yaml: base", "YAML reads it as a section. Put it in quotes."),
        ("space.bounds.weight=[1]", "search.yaml: space", "weight"),
        ("optimizer.name=cmaes", "search.yaml: optimizer.name", "there is no optimizer 'cmaes'. Did you mean 'cma'?"),
        ("optimizer={}", "search.yaml: optimizer.name", "is missing"),
        ("optimizer.populations=4", "search.yaml: optimizer.populations", "not a known key. Did you mean"),
        ("optimizer.population=x", "search.yaml: optimizer.population", "must be a whole number"),
        ("observers=[{kind: paper}]", "search.yaml: observers.0.kind", "there is no observer 'paper'. There are: logs"),
        ("observers=[{kind: prometheus, prt: 1}]", "search.yaml: observers.0.prt", "Did you mean 'port'?"),
        ("objectives={}", "search.yaml: objectives", "needs at least 1, has 0"),
        ("objectives.maths={task: x}", "search.yaml: objectives.maths.metric", "is missing"),
        ("objectives.maths.evaluator=lmeval", "objectives.maths.evaluator", "Did you mean 'lm_eval'?"),
        ("objectives.maths.tasks=x", "objectives.maths.tasks", "Did you mean 'task'?"),
        ("objectives.maths.direction=up", "search.yaml: objectives.maths.direction", "'maximize' or 'minimize'"),
        ("cluster.gpus_per_worker=-1", "search.yaml: cluster.gpus_per_worker", "greater than or equal to 0"),
    ],
)
def test_faults_name_the_place_and_the_mend(path: Path, override: str, place: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_search_file(path, [override])
    assert place in caught.value.place
    assert words in str(caught.value)


@pytest.mark.parametrize(("key", "written"), [("budget", "budgets"), ("objectives", "objective"), ("space", "spaces")])
def test_a_misspelt_key_that_must_be_there_is_told_as_misspelt(path: Path, key: str, written: str) -> None:
    content = yaml.safe_load(path.read_text())
    content[written] = content.pop(key)
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=f"Did you mean '{key}'") as caught:
        load_search_file(path)
    assert caught.value.place.endswith(f"search.yaml: {written}")


@pytest.mark.parametrize(
    ("override", "words"),
    [("budget", "not of the form key.path=value"), ("name.x=1", "'name' is not a section"), ("x=[1", "expected")],
)
def test_overrides_that_cannot_be_read(path: Path, override: str, words: str) -> None:
    with pytest.raises(InputError, match="--set") as caught:
        load_search_file(path, [override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a list", "its top level must be keys"),
        ("name: a\nname: b", "name"),
        ("name: [", "line"),
        ("", "its top level must be keys"),
    ],
)
def test_files_that_are_no_search_file(path: Path, text: str, words: str) -> None:
    path.write_text(text)
    with pytest.raises(InputError, match=str(path)) as caught:
        load_search_file(path)
    assert words in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        load_search_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "reference",
    ["a/" * 5000 + "a", "~nobody-of-this-name/x", "x" * 100_000, "base" + "+x" * 3000, "a\nb", "/tmp/\u202exyz"],
)
def test_references_of_any_kind_are_kept_for_whoever_opens_them(path: Path, reference: str) -> None:
    content = yaml.safe_load(path.read_text()) | {"sources": {"base": "x", "maths": reference}, "base": "base"}
    parsed = parse_search_file(content, place="search.yaml", root=path.parent)
    assert parsed.sources["maths"].endswith(reference[-3:])


def test_a_search_file_that_is_no_plain_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes("name: ß".encode("latin-1"))
    for name in ("pipe", "loop", "zero", "folder", "latin"):
        with pytest.raises(InputError, match=f"{name}.yaml"):
            load_search_file(tmp_path / f"{name}.yaml")


def test_calibration_texts_of_single_sources(path: Path) -> None:
    file = load_search_file(path, ["calibration={file: t.txt, sources: {maths: m.txt}}"])
    assert file.calibration is not None
    assert file.calibration.files == (path.parent / "t.txt", path.parent / "m.txt")
    assert SearchFile.model_validate(file.model_dump(mode="json")) == file
    with pytest.raises(InputError, match="names no texts"):
        load_search_file(path, ["calibration={prompts: 3}"])
