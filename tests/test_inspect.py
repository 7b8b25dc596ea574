"""`evomerge inspect`: every number against a plain formula over the files, and what it says of models."""

from __future__ import annotations

import io
import math
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_checkpoints import WORDS, edit_tensors, save_model, save_tokenizer, tiny_config
from helpers_miniature import MINIATURES, evomerge, json_of, search_file
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from test_adapters import train
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from evomerge.checkpoints.source import open_source
from evomerge.errors import InputError
from evomerge.merging.arithmetic.jobs import WorkerThreads
from evomerge.merging.measured import rounding
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Facts
from evomerge.merging.measured.facts import Weights as SourceWeights
from evomerge.merging.measured.rounding import LOSSY, squared_loss
from evomerge.merging.site import Site
from evomerge.recipes.stack import Role
from evomerge.report.closeness import shown
from evomerge.report.inspected import Inspection
from evomerge.report.inspection import inspect_models, short_names

Weights = dict[str, Tensor]


def tuned(base: Path, name: str, *, seed: int, size: float, share: float = 1.0, unchanged: str = "nothing") -> Path:
    """A copy of a model with a share of its elements moved, but for tensors whose names hold ``unchanged``."""
    folder = base.with_name(name)
    shutil.copytree(base, folder)

    def move(tensors: Weights) -> None:
        random = torch.Generator().manual_seed(seed)
        for key, tensor in tensors.items():
            by = size * torch.randn(tensor.shape, generator=random)
            by *= torch.rand(tensor.shape, generator=random) < share
            if unchanged not in key:
                tensor.add_(by)

    edit_tensors(folder, move)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and tunes of it; 15 wide, so that norms and some rows are of odd length."""
    root = tmp_path_factory.mktemp("models")
    config = tiny_config(hidden_size=12, intermediate_size=15, num_hidden_layers=3)
    base = save_model(config, root / "base")
    tuned(base, "maths", seed=1, size=0.001)
    tuned(base, "code", seed=2, size=0.01, share=0.5, unchanged="layers.1.")
    tuned(base.with_name("code"), "chat", seed=3, size=0.01)
    tuned(base, "against", seed=2, size=-0.01, share=0.5)
    tuned(base, "code-again", seed=2, size=0.0101, share=0.5, unchanged="layers.1.")
    shutil.copytree(base, root / "copy")
    save_model(config, root / "stranger", seed=7)
    save_model(config, root / "wide", dtype=torch.float32)
    return root


def inspected(root: Path, *names: str, base: str | None = None) -> Inspection:
    return inspect_models([str(root / name) for name in names], base and str(root / base))


def printed(found: Inspection, width: int = 80) -> str:
    """As a terminal without colours shows it."""
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    console.print(shown(found, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def part_of(name: str) -> str:
    if "layers." in name:
        return f"layer {name.split('layers.')[1].split('.')[0]}"
    return {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm", "lm_head.weight": "head"}[name]


def flat(folder: Path, part: str | None) -> Tensor:
    """All weights of a part of a model, or of all of it, in float64."""
    tensors = load_file(folder / "model.safetensors")
    return torch.cat([t.double().flatten() for n, t in sorted(tensors.items()) if part in (None, part_of(n))])


# --- numbers


def test_every_number_is_that_of_the_plain_formula(models: Path) -> None:
    names = ["maths", "code", "chat"]
    found = inspected(models, "base", *names)
    assert found.base == "base"
    assert found.parts == ["embedding", "layer 0", "layer 1", "layer 2", "norm", "head"]
    assert [source.name for source in found.sources] == names
    assert [(pair.a, pair.b) for pair in found.pairs] == list(combinations(names, 2))
    for at, part in enumerate([None, *found.parts]):
        base = flat(models / "base", part)
        deltas = {name: flat(models / name, part) - base for name in names}
        for source in found.sources:
            distance, d = source.parts[at - 1] if part else source.whole, deltas[source.name]
            assert distance.relative_norm == pytest.approx(float(d.norm() / base.norm()), rel=1e-5)
            assert distance.mean_change == pytest.approx(float(d.abs().mean()), rel=1e-5)
            assert distance.changed == int((d != 0).sum()) / len(d)
        for pair in found.pairs:
            near, (a, b) = pair.parts[at - 1] if part else pair.whole, (deltas[pair.a], deltas[pair.b])
            both = (a != 0) & (b != 0)
            if not both.any():
                assert near.cosine is None
                assert near.sign_agreement is None
                continue
            assert near.cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-5)
            assert near.sign_agreement == float((a[both] > 0).eq(b[both] > 0).double().mean())


@pytest.mark.parametrize("count", [1, 2, 1023, 1024, 1025, (1 << 21) - 1, (1 << 21) + 3])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 3, (torch.bfloat16, torch.float32, torch.float16)])
def test_signs_of_any_length_and_dtype(count: int, dtypes: tuple[torch.dtype, ...]) -> None:
    random = torch.Generator().manual_seed(count)
    base = torch.randn(count, generator=random)
    tensors = {
        name: (base + k * (torch.rand(count, generator=random) - 0.4).relu()).to(dtype)
        for k, (name, dtype) in enumerate(zip("bxy", dtypes, strict=True))
    }
    weights = SourceWeights(lambda ref: tensors[ref[0]], WorkerThreads(2))
    site = Site("w", Role("mlp", 0), (count,), {name: (name, "w") for name in "bxy"})
    total = Facts(site, weights, Evidence(), seed=0).signs("bxy")
    deltas = [(tensors[name].float() - tensors["b"].float()).double() for name in "xy"]
    for k, d in enumerate(deltas):
        assert total[2, k, k] == pytest.approx(float(d.abs().sum()), rel=1e-12)
        for m, other in enumerate(deltas[: k + 1]):
            product = d.sign() * other.sign()
            assert total[:2, k, m].tolist() == [int((product != 0).sum()), int(product.sum())]


def test_an_adapter_counts_as_what_it_makes_of_its_model(models: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(models / "wide")
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    adapted.merge_and_unload().save_pretrained(tmp_path / "folded")
    save_tokenizer(tmp_path / "folded")
    wide = str(models / "wide")
    found = inspect_models([wide, f"{wide}+{tmp_path / 'lora'}", str(tmp_path / "folded")], None)
    assert [source.name for source in found.sources] == ["wide+lora", "folded"]
    assert found.models[1].adapters == [str(tmp_path / "lora")]
    one, other = (source.whole for source in found.sources)
    assert one.relative_norm == pytest.approx(other.relative_norm, rel=1e-5)
    assert found.pairs[0].whole.cosine == pytest.approx(1)


def test_progress_counts_all_bytes(models: Path) -> None:
    seen: list[tuple[int, int]] = []
    inspect_models([str(models / "base"), str(models / "wide")], None, lambda done, of: seen.append((done, of)))
    size = sum(t.nbytes for name in ("base", "wide") for t in load_file(models / name / "model.safetensors").values())
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


# --- which models


def test_a_single_model_is_described(models: Path) -> None:
    found = inspected(models, "base")
    assert found == Inspection(models=found.models)
    facts = found.models[0]
    model = AutoModelForCausalLM.from_pretrained(models / "base")
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.bytes == 2 * facts.parameters
    assert (facts.architecture, facts.layers, facts.hidden_size) == ("LlamaForCausalLM", 3, 12)
    assert (facts.dtype, facts.vocab_size, facts.tokens, facts.tied) == ("bfloat16", 32, len(WORDS), False)
    text = printed(found)
    for words in ("LlamaForCausalLM, 3 layers", "bfloat16", "32 rows, 32 tokens", "weights of its own"):
        assert words in text


def test_the_base_is_the_one_named_or_the_first(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = inspected(models, "base", "code", "chat")
    assert inspected(models, "code", "chat", base="base") == first
    assert inspected(models, "code", "base", "chat", base="base") == first
    assert inspected(models, "code", "base").base == "code"
    assert evomerge("inspect", models / "base", models / "code") == 0
    assert "The base is base, because it was named first" in capsys.readouterr().out
    assert evomerge("inspect", models / "code", "--base", models / "base") == 0
    assert "named first" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("references", "names"),
    [
        (["models/base", "models/maths/"], ["base", "maths"]),
        (["a/model", "b/model"], ["a/model", "b/model"]),
        (["org/base+org/lora", "org/base"], ["base+lora", "base"]),
        (["org/base@v1", "org/base@v2"], ["base@v1", "base@v2"]),
        (["base", "base/"], ["base", "base/"]),
        (["."], ["."]),
    ],
)
def test_names_are_short_and_differ(references: list[str], names: list[str]) -> None:
    assert short_names(references) == names


def test_models_that_cannot_be_compared_are_still_described(models: Path) -> None:
    save_model(
        GPT2Config(vocab_size=32, n_embd=12, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2), models / "gpt2"
    )
    save_model(tiny_config(hidden_size=12, intermediate_size=15), models / "short")
    save_model(tiny_config(hidden_size=12, intermediate_size=20, num_hidden_layers=3), models / "fat")
    found = inspected(models, "base", "gpt2", "short", "fat", "code")
    assert [facts.name for facts in found.models] == ["base", "gpt2", "short", "fat", "code"]
    assert [source.name for source in found.sources] == ["code"]
    assert found.apart == {
        "gpt2": "it is a gpt2, and base a llama",
        "short": "it has 2 layers, and base 3",
        "fat": "its model.layers.0.mlp.down_proj.weight has shape [12, 20], and that of base [12, 15]",
    }
    assert found.sources[0].whole == inspected(models, "base", "code").sources[0].whole
    assert "gpt2 cannot be merged with base: it is a gpt2, and base a llama." in found.warnings
    alone = inspected(models, "base", "gpt2")
    assert (alone.sources, alone.parts) == ([], [])
    assert "it is a gpt2" in printed(alone)


def test_other_vocabularies_are_told_and_layers_still_compared(models: Path) -> None:
    config = tiny_config(hidden_size=12, intermediate_size=15, num_hidden_layers=3, vocab_size=40)
    save_model(config, models / "more-words")
    found = inspected(models, "base", "more-words", "code")
    assert found.left_out == ["model.embed_tokens.weight", "lm_head.weight"]
    assert found.parts == ["layer 0", "layer 1", "layer 2", "norm"]
    assert any("differ in vocab_size: 40 and 32" in warning for warning in found.warnings)
    shutil.copytree(models / "code", models / "other-words")
    save_tokenizer(models / "other-words", [*WORDS[:-1], "another"], bos_token="<unk>")
    found = inspected(models, "base", "other-words")
    assert found.left_out == []
    (warning,) = [warning for warning in found.warnings if "cannot be merged" in warning]
    assert "vocabulary" in warning
    assert "'w28'" in warning or "'another'" in warning


# --- warnings


def warnings(root: Path, *names: str) -> str:
    return "\n".join(inspected(root, "base", *names).warnings)


def test_warns_of_what_will_not_merge_well(models: Path) -> None:
    assert warnings(models, "copy") == "copy has the weights of base: 0 elements differ."
    again = warnings(models, "code", "code-again")
    assert "code and code-again are nearly the same change (cosine 0.99" in again or "(cosine 1.000)" in again
    against = warnings(models, "code", "against")
    assert "code and against work against each other (cosine -0." in against
    assert "code left 1 of 3 layers as they are in base: 1." in against
    large = flat(models / "chat", None) - flat(models / "base", None)
    told = f"The changes of chat ({float(large.abs().mean()):.2g}) are large"
    assert told in warnings(models, "maths", "chat")


def test_models_that_share_nothing_are_no_tunes(models: Path) -> None:
    """Two random models: |d| / |b| is the root of two, but for norms, which all begin at one."""
    for folder in (models / "unrelated", models / "its-base"):
        shutil.copytree(models / "stranger", folder)
    edit_tensors(models / "unrelated", lambda tensors: [t.normal_() for t in tensors.values()])
    edit_tensors(models / "its-base", lambda tensors: [t.normal_() for t in tensors.values()])
    found = inspected(models, "its-base", "unrelated")
    ratio = found.sources[0].whole.relative_norm
    assert ratio == pytest.approx(math.sqrt(2), rel=0.05)
    assert f"unrelated is not a fine-tune of its-base: its change is {ratio:.2f} times" in "\n".join(found.warnings)


def test_says_when_nothing_speaks_against_it(models: Path) -> None:
    found = inspected(models, "base", "maths")
    assert found.warnings == []
    assert "Nothing speaks against merging these." in printed(found)
    assert "Nothing speaks" not in printed(inspected(models, "base", "chat"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_model_is_refused_by_the_name_of_its_tensor(models: Path, tmp_path: Path, value: float) -> None:
    shutil.copytree(models / "code", tmp_path / "broken")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(tmp_path / "broken", lambda tensors: tensors[name][0, :3].fill_(value))
    for references in ([str(tmp_path / "broken")], [str(models / "base"), str(tmp_path / "broken")]):
        with pytest.raises(InputError, match=f"{name} .* has NaN or Inf in 3 of"):
            inspect_models(references, None)


# --- what is rounded away


def lost(base: dict[str, Tensor], tuned: dict[str, Tensor], dtype: torch.dtype) -> float:
    """||r(b + d) - r(b) - d|| / ||d||, element by element in float64; weights are given as b and b + d."""
    b, x = (torch.cat([ts[name].float().flatten() for name in sorted(base)]) for ts in (base, tuned))
    d = x.double() - b.double()
    return float((x.to(dtype).double() - b.to(dtype).double() - d).norm() / d.norm())


def weights_of(reference: str) -> dict[str, Tensor]:
    source = open_source("it", reference, place="it")
    return {name: source.read(name).clone() for name in source.tensors}


ROUNDED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "lora": ("base", {"r": 4, "lora_alpha": 0.02, "target_modules": "all-linear"}, True),
    "dora, whose magnitudes moved": (
        "base",
        {"r": 4, "lora_alpha": 0.02, "target_modules": "all-linear", "use_dora": True},
        False,
    ),
    "embedding": ("base", {"r": 2, "lora_alpha": 0.01, "target_modules": ["embed_tokens", "lm_head"]}, True),
    "one layer": ("base", {"r": 2, "lora_alpha": 0.01, "target_modules": ["o_proj"], "layers_to_transform": [1]}, True),
    "far above a step": ("base", {"r": 4, "lora_alpha": 400, "target_modules": "all-linear"}, False),
    "float32 base": ("wide", {"r": 4, "lora_alpha": 0.02, "target_modules": "all-linear"}, False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ROUNDED)
def test_says_how_much_of_an_adapter_is_rounded_away(models: Path, tmp_path: Path, case: str) -> None:
    name, settings, warned = ROUNDED[case]
    base = models / name
    reference = f"{base}+{train(base, tmp_path / 'lora', **settings)}"
    found = inspect_models([str(base), reference], None)
    dtype = torch.float32 if name == "wide" else torch.bfloat16
    expected = lost(weights_of(str(base)), weights_of(reference), dtype)
    assert found.sources[0].whole.rounded_away == pytest.approx(expected, rel=1e-5, abs=1e-7)
    told = [warning for warning in found.warnings if "survives in bfloat16" in warning]
    assert len(told) == warned
    if warned:
        assert expected >= LOSSY
        assert f"{name}+lora: {max(0.0, 1 - expected):.0%} of its change" in told[0]
        assert "`dtype: float32`" in told[0]
        assert "`together`" in told[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tune_in_float32_is_rounded_to_the_bases_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_model(tiny_config(), tmp_path / "base", dtype=dtype)
    wide = save_model(tiny_config(), tmp_path / "wide", dtype=torch.float32)

    def move(tensors: Weights) -> None:
        for name, tensor in load_file(base / "model.safetensors").items():
            by = 2e-5 if "layers.1." in name else 0.1
            tensors[name].copy_(tensor.float() + by * torch.randn(tensor.shape))

    edit_tensors(wide, move)
    found = inspect_models([str(base), str(wide)], None)
    weights = [load_file(folder / "model.safetensors") for folder in (base, wide)]
    assert found.sources[0].whole.rounded_away == pytest.approx(lost(weights[0], weights[1], dtype), rel=1e-5)
    layers = [{name: t for name, t in tensors.items() if "layers.1." in name} for tensors in weights]
    share = lost(layers[0], layers[1], dtype)
    assert found.sources[0].parts[found.parts.index("layer 1")].rounded_away == pytest.approx(share, rel=1e-5)
    (told,) = [warning for warning in found.warnings if "survives in" in warning]
    assert f"wide: {max(0.0, 1 - share):.0%} of its change in layer 1 survives" in told
    assert "together" not in told


def test_a_tune_in_the_bases_dtype_loses_nothing(models: Path) -> None:
    found = inspected(models, "base", "maths", "code")
    assert [source.whole.rounded_away for source in found.sources] == [0, 0]


def test_what_is_beyond_the_dtype_is_its_largest_number() -> None:
    base, tuned = torch.tensor([65504.0, 1.0]), torch.tensor([70000.0, 1.0])
    assert float(squared_loss(base, tuned, torch.float16)) == pytest.approx((70000 - 65504) ** 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, True),
        ({"dtype": "float32"}, False),
        ({"dtype": "float16", "lora_alpha": 0.001}, True),
        ({"together": 2}, False),
        ({"space": {"method": "linear"}, "base": None}, True),
        ({"lora_alpha": 4000}, False),
    ],
)
def test_validate_says_what_every_candidate_rounds_away(
    tmp_path: Path, changes: dict[str, Any], told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    alpha = changes.pop("lora_alpha", 0.01)
    adapter = train(MINIATURES / "base", tmp_path / "lora", r=4, lora_alpha=alpha, target_modules="all-linear")
    sources = {"base": str(MINIATURES / "base"), "tune": f"{MINIATURES / 'base'}+{adapter}"}
    assert evomerge("validate", search_file(tmp_path, sources=sources, **changes)) == 0
    dtype = changes.get("dtype", "bfloat16")
    said = " ".join(capsys.readouterr().out.split())
    assert (f"survives in {dtype}" in said) == told
    if told:
        expected = lost(weights_of(sources["base"]), weights_of(sources["tune"]), getattr(torch, dtype))
        assert f"tune: {max(0.0, 1 - expected):.0%} of its change" in said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "o_proj"], ["down_proj"]])
def test_inspect_and_validate_say_the_same_of_several_adapters_in_one_sentence(
    targets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "_ELEMENTS", 50_000)  # fewer than there are
    base = MINIATURES / "base"
    settings = {"r": 2, "target_modules": targets}
    alphas = {"a": 0.004, "b": 0.003, "c": 0.002}
    sources = {n: f"{base}+{train(base, tmp_path / n, lora_alpha=alpha, **settings)}" for n, alpha in alphas.items()}
    opened = {n: open_source(n, reference, place=n) for n, reference in {"base": str(base), **sources}.items()}
    lost = rounding.shares_lost(opened, "base", opened["base"], None)
    sentence = rounding.rounding_warning(lost, torch.bfloat16, adapted=True)
    assert min(lost.values()) >= LOSSY
    assert sentence.startswith("a, b, c: ")
    assert "of their changes survive in bfloat16" in sentence
    inspection = inspect_models([str(base), *sources.values()], None, called={r: n for n, r in sources.items()})
    assert [warning for warning in inspection.warnings if "survive" in warning] == [f"{sentence}."]
    assert evomerge("validate", search_file(tmp_path, sources={"base": str(base), **sources})) == 0
    assert sentence in " ".join(capsys.readouterr().out.split())


# --- what is printed


def test_the_screen_fits_80_columns_and_shows_every_layer(models: Path) -> None:
    names = ["maths", "code", "chat", "against", "code-again", "copy"]
    found = inspected(models, "base", *names)
    text = printed(found)
    assert max(map(len, text.splitlines())) <= 80
    for pair in combinations("ABCDEF", 2):
        assert f"{pair[0]}·{pair[1]}" in text
    assert text.count("layer 2") == 3  # norms and ranks of six sources and fifteen pairs are more than two maps hold
    row = next(line for line in text.splitlines() if line.startswith("layer 0")).split()
    assert row[2] == f"{found.sources[0].parts[1].relative_norm or 0:.2%}"  # below one percent
    assert row[7] == "0%"


def test_colours_tell_together_from_against(models: Path) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    console.print(shown(inspected(models, "base", "code", "against", "code-again"), 80))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()

    def background(number: str) -> list[int]:
        escape = text[: text.index(number)].rpartition("\x1b[")[2]
        return [int(part) for part in escape.partition("48;2;")[2].partition("m")[0].split(";")]

    red, _, blue = background("-0.8" if "-0.8" in text else "-0.7")
    assert red > 2 * blue
    red, _, blue = background("+1.00")
    assert blue > 2 * red


def test_as_json_it_is_the_inspection(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "inspect", models / "base", models / "code", models / "chat", "--json")
    assert Inspection.model_validate(found) == inspected(models, "base", "code", "chat")


def test_the_miniatures(capsys: pytest.CaptureFixture[str]) -> None:
    references = [str(MINIATURES / name) for name in ("base", "maths", "japanese")]
    assert evomerge("inspect", *references) == 0
    text = capsys.readouterr().out
    assert "maths" in text
    assert "layer 5" in text
    deltas = [flat(MINIATURES / name, None) - flat(MINIATURES / "base", None) for name in ("maths", "japanese")]
    cosine = float(torch.dot(*deltas) / np.prod([d.norm() for d in deltas]))
    assert f"{cosine:+.2f}" in text


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str], models: Path) -> None:
    assert evomerge("inspect", models / "base", models / "nowhere") == 2
    assert "there is no folder" in capsys.readouterr().err
