"""Adapters on sources, against peft's own merge in float32."""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers_checkpoints import WORDS, edit_json, save_model, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from evomerge.checkpoints import places
from evomerge.checkpoints.buffers import Buffers
from evomerge.checkpoints.fingerprints import check_fingerprints, fingerprint
from evomerge.checkpoints.live import live_model, load_weights
from evomerge.checkpoints.source import Source, open_source
from evomerge.errors import InputError
from evomerge.merging.adapters.low_rank import family_of
from evomerge.merging.core_space import NotLowRankError
from evomerge.merging.materialise import Materialiser
from evomerge.method import default_parameters, find_method
from evomerge.recipes.stack import Blend, StackRecipe

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPT = torch.arange(3, 15).reshape(2, 6)

GPT2 = GPT2Config(vocab_size=len(WORDS), n_positions=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_config(), tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(GPT2, tmp_path_factory.mktemp("models") / "gpt2")


def train(base: Path, folder: Path, *, seed: int = 0, kind: Any = peft.LoraConfig, **settings: Any) -> Path:
    """An adapter of random numbers on a base, saved by peft."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


def merged(base: Path, *adapters: Path) -> Any:
    """What peft makes of them: the reference."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = [f"a{i}" for i in range(len(adapters))]
    model = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    return model.merge_and_unload(adapter_names=names).eval()


def opened(base: Path, *adapters: Path) -> Source:
    return open_source("maths", "+".join(map(str, (base, *adapters))), place="sources.maths")


def same_as_peft(base: Path, *adapters: Path) -> Source:
    """Compare every tensor and the logits; return the source."""
    source, reference = opened(base, *adapters), merged(base, *adapters)
    state = reference.state_dict()
    for name in source.tensors:
        assert torch.allclose(source.read(name).float(), state[name], rtol=1e-5, atol=1e-6), name
    live = live_model(source, torch.device("cpu"), torch.float32)
    load_weights(live, ((name, source.read(name)) for name in source.tensors))
    with torch.inference_mode():
        assert torch.allclose(live.model(PROMPT).logits, reference(PROMPT).logits, rtol=1e-4, atol=1e-5)
    return source


CASES: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 16, "target_modules": LINEAR},
    "all linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "rslora": {"r": 4, "lora_alpha": 16, "target_modules": LINEAR, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "use_dora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": LINEAR, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {"q_proj": 5, "1.mlp.down_proj": 7.5},
    },
    "patterns rslora": {
        "r": 4, "lora_alpha": 8, "target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"v_proj": 9},
    },
    "embeddings": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "embeddings dora": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "full tensors": {"r": 2, "target_modules": ["k_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "one layer": {"r": 2, "target_modules": ["o_proj"], "layers_to_transform": [1]},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_a_fold_is_what_peft_makes_of_it(plain: Path, tmp_path: Path, case: str) -> None:
    adapter = train(plain, tmp_path / "adapter", **CASES[case])
    source = same_as_peft(plain, adapter)
    base = opened(plain)
    changed = [name for name in base.tensors if not torch.equal(source.read(name), base.read(name))]
    assert changed
    assert all(source.read(name).dtype == torch.float32 for name in changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True])
def test_weights_of_gpt2_are_stored_the_other_way_round(gpt2: Path, tmp_path: Path, dora: bool) -> None:
    modules = ["c_attn", "c_proj", "c_fc"]
    adapter = train(gpt2, tmp_path, target_modules=modules, r=4, use_dora=dora, fan_in_fan_out=True)
    same_as_peft(gpt2, adapter)
    edit_json(tmp_path / CONFIG, fan_in_fan_out=False)  # peft goes by the module as well
    same_as_peft(gpt2, adapter)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_replace_those_of_the_base(gpt2: Path, tmp_path: Path, bias: str) -> None:
    adapter = train(gpt2, tmp_path, target_modules=["c_attn"], r=2, bias=bias, fan_in_fan_out=True)
    source = same_as_peft(gpt2, adapter)
    name = "transformer.h.0.attn.c_attn.bias"
    assert not torch.equal(source.read(name).bfloat16(), opened(gpt2).read(name))


@pytest.mark.filterwarnings("ignore")
def test_the_bias_of_a_factor_moves_the_layers_own(gpt2: Path, tmp_path: Path) -> None:
    adapter = train(gpt2, tmp_path, target_modules=["c_attn"], r=2, lora_bias=True, fan_in_fan_out=True)
    same_as_peft(gpt2, adapter)


VECTORS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all linear": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "feedforward_modules": ["o_proj", "down_proj"],
    },
    "full tensors": {"modules_to_save": ["norm"]},
}


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer heads of keys and values, and biases of the attention that are not zero."""
    folder = save_model(
        tiny_config(num_key_value_heads=1, attention_bias=True), tmp_path_factory.mktemp("models") / "grouped"
    )
    stored = load_file(folder / "model.safetensors")
    torch.manual_seed(9)
    save_file(
        {n: torch.randn_like(t) if n.endswith("bias") else t for n, t in stored.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", VECTORS)
def test_vectors_multiply_as_peft_does_it(grouped: Path, tmp_path: Path, case: str) -> None:
    adapter = train(grouped, tmp_path / "adapter", kind=peft.IA3Config, **VECTORS[case])
    source, base = same_as_peft(grouped, adapter), opened(grouped)
    rows, columns = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"
    ((of_rows, false),), ((of_columns, true),) = source.vectors(rows), source.vectors(columns)
    assert (false, true) == (False, True)
    assert torch.equal(source.read(rows), of_rows[:, None] * base.read(rows).float())
    assert torch.equal(source.read(columns), base.read(columns).float() * of_columns)
    bias = "model.layers.0.self_attn.k_proj.bias"
    assert torch.equal(source.read(bias), of_rows * base.read(bias).float())
    assert source.vectors("model.layers.0.input_layernorm.weight") == []


@pytest.mark.filterwarnings("ignore")
def test_vectors_of_gpt2_go_by_modules_stored_the_other_way_round(gpt2: Path, tmp_path: Path) -> None:
    names = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True}
    adapter = train(gpt2, tmp_path, kind=peft.IA3Config, **names)
    source = same_as_peft(gpt2, adapter)
    assert source.vectors("transformer.h.0.attn.c_attn.weight")[0][1]
    assert source.vectors("transformer.h.0.attn.c_attn.bias")


@pytest.mark.filterwarnings("ignore")
def test_several_vectors_multiply_each_other(grouped: Path, tmp_path: Path) -> None:
    same_as_peft(grouped, *(train(grouped, tmp_path / str(s), seed=s, kind=peft.IA3Config) for s in range(2)))


@pytest.mark.filterwarnings("ignore")
def test_task_arithmetic_of_vectors_is_theirs(grouped: Path, tmp_path: Path) -> None:
    folders = [train(grouped, tmp_path / str(seed), seed=seed, kind=peft.IA3Config) for seed in range(2)]
    sources = {"base": opened(grouped), "a": opened(grouped, folders[0]), "b": opened(grouped, folders[1])}
    with pytest.raises(NotLowRankError, match=r"multiplies .*by a vector"):
        family_of(sources)
    weights = {"a": 0.75, "b": -0.5}
    parameters = default_parameters(find_method("task_arithmetic", "method"), ["a", "b"]) | {"weight": weights}
    recipe = StackRecipe.uniform(
        Blend(method="task_arithmetic", sources=("a", "b"), base="base", parameters=parameters),
        sources={name: source.reference for name, source in sources.items()},
        tokenizer="base",
        layers=sources["base"].layers,
        dtype="float32",
    )
    for name, tensor in Materialiser(sources).tensors(recipe):
        stored = expected = sources["base"].read(name).float()
        if vectors := {k: sources[k].vectors(name) for k in weights if sources[k].vectors(name)}:
            factor = 1 + sum(weights[k] * (vector - 1) for k, ((vector, _),) in vectors.items())
            expected = stored * (factor if vectors["a"][0][1] or stored.dim() == 1 else factor[:, None])
        assert torch.allclose(tensor, expected, rtol=1e-5, atol=1e-6), name


@pytest.mark.filterwarnings("ignore")
def test_vectors_that_fit_nothing_are_refused(grouped: Path, tmp_path: Path) -> None:
    adapter = train(grouped, tmp_path / "adapter", kind=peft.IA3Config)
    key = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
    for shape, words in (((7, 1), r"shape \[7, 16\]; here it is \[4, 16\]"), ((2, 2), "not a vector")):
        tensors(lambda found, shape=shape: found.update({key: torch.ones(shape)}))(adapter)
        with pytest.raises(InputError, match=words):
            opened(grouped, adapter)
    edit_json(adapter / CONFIG, peft_type="LORA", r=1, lora_alpha=1)
    with pytest.raises(InputError, match="not a pair of matrices"):
        opened(grouped, adapter)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True])
def test_several_adapters_are_folded_in_their_order(plain: Path, tmp_path: Path, dora: bool) -> None:
    one = train(plain, tmp_path / "one", r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], use_dora=dora)
    two = train(plain, tmp_path / "two", seed=1, r=3, lora_alpha=5, target_modules=["q_proj", "o_proj"], use_dora=dora)
    source = same_as_peft(plain, one, two)
    assert len(source.changes["model.layers.0.self_attn.q_proj.weight"]) == 2


def test_the_fold_is_exact_and_the_rest_stays_mapped(plain: Path, tmp_path: Path) -> None:
    """In double precision, from the files alone."""
    adapter = train(plain, tmp_path, r=4, lora_alpha=16, target_modules=["q_proj"])
    source, factors = opened(plain, adapter), load_file(tmp_path / WEIGHTS)
    name = "model.layers.1.self_attn.q_proj"
    up, down = (factors[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "BA")
    stored = opened(plain).read(f"{name}.weight")
    exact = stored.double() + 4 * up @ down
    assert torch.allclose(source.read(f"{name}.weight").double(), exact, rtol=0, atol=1e-6)
    assert not torch.equal(exact.bfloat16().double(), exact)
    untouched = "model.layers.1.mlp.up_proj.weight"
    assert source.read(untouched).dtype == torch.bfloat16
    assert source.read(untouched).data_ptr() == source.read(untouched).data_ptr()
    assert source.dtype == torch.bfloat16
    assert source.tensors[f"{name}.weight"].dtype == "BF16"


def test_folds_share_memory_one_after_the_other(plain: Path, tmp_path: Path) -> None:
    """Memory is used again when no tensor lies in it any more, be it a piece of what was read."""
    source = opened(plain, train(plain, tmp_path, r=4, lora_alpha=16, target_modules=LINEAR))
    first, second = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    expected = {name: source.read(name).clone() for name in (first, second)}
    held = source.read(first)[3:5]
    others = [source.read(second) for _ in range(4)]
    assert torch.equal(held, expected[first][3:5])
    assert len({other.data_ptr() for other in others}) == 4
    assert all(torch.equal(other, expected[second]) for other in others)
    as_array, place = source.read(first).view(-1)[7:].numpy(), others[0].data_ptr()
    del others
    again = [source.read(second) for _ in range(4)]
    assert place in {tensor.data_ptr() for tensor in again}
    assert torch.equal(torch.from_numpy(as_array), expected[first].view(-1)[7:])


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5, 7), (2, 3, 4)])
def test_buffers_have_any_shape_and_begin_where_vectors_do(shape: tuple[int, ...]) -> None:
    buffers = Buffers()
    for _ in range(3):
        tensor = buffers.empty(shape)
        assert tensor.shape == shape
        assert tensor.is_contiguous()
        assert tensor.dtype == torch.float32
        assert tensor.data_ptr() % 64 == 0


def test_buffers_keep_no_more_than_were_lent_at_once() -> None:
    buffers = Buffers()
    for size in range(1, 50):
        held = [buffers.empty((size, 100)) for _ in range(2)]
        assert len({tensor.data_ptr() for tensor in held}) == 2
        del held
    assert len(buffers._free) == 2


def test_a_file_is_mapped_once_however_many_sources_hold_it(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "plain")
    adapter = train(tmp_path / "plain", tmp_path / "adapter", r=4, target_modules=["q_proj"])
    name = "model.layers.1.mlp.up_proj.weight"
    sources = [opened(tmp_path / "plain"), opened(tmp_path / "plain", adapter)]
    one, other = (source.read(name) for source in sources)
    assert one.data_ptr() == other.data_ptr()
    weights = tmp_path / "plain" / "model.safetensors"
    changed = {key: tensor + 1 for key, tensor in load_file(weights).items()}
    save_file(changed, tmp_path / "new", metadata={"format": "pt"})
    (tmp_path / "new").replace(weights)
    assert torch.equal(opened(tmp_path / "plain").read(name), changed[name])
    assert not torch.equal(one, changed[name])


def test_factors_in_half_precision_are_multiplied_in_float32(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path, r=4, lora_alpha=16, target_modules=["q_proj"])
    halved = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(halved, tmp_path / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj"
    up, down = (halved[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "BA")
    exact = opened(plain).read(f"{name}.weight").double() + 4 * up @ down
    assert torch.allclose(opened(plain, tmp_path).read(f"{name}.weight").double(), exact, rtol=0, atol=1e-6)


def test_an_adapter_of_single_experts_is_folded_into_each(tmp_path: Path) -> None:
    """As older versions of the libraries write them: a module an expert."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    base = save_model(config, tmp_path / "base", dtype=torch.float32)
    adapter = train(base, tmp_path / "adapter", r=2, lora_alpha=4, target_modules=["q_proj"])
    name = "model.layers.1.block_sparse_moe.experts.2.w2"
    up, down = torch.randn(16, 2), torch.randn(2, 8)
    key = f"base_model.model.{name}.lora_"
    save_file({f"{key}A.weight": down, f"{key}B.weight": up}, adapter / WEIGHTS)
    source, plain = opened(base, adapter), opened(base)
    assert list(source.changes) == [f"{name}.weight"]
    assert torch.allclose(source.read(f"{name}.weight"), plain.read(f"{name}.weight") + 2 * up @ down, atol=1e-6)


# ---- as part of a source ----


def test_a_source_with_an_adapter_travels_between_processes(plain: Path, tmp_path: Path) -> None:
    source = opened(plain, train(plain, tmp_path, r=2, target_modules=["q_proj"]))
    raw = pickle.dumps(source)
    copy = pickle.loads(raw)
    assert copy == source
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(copy.read(name), source.read(name))


def test_fingerprints_see_every_adapter(plain: Path, tmp_path: Path) -> None:
    one = train(plain, tmp_path / "one", r=2, target_modules=["q_proj"])
    two = train(plain, tmp_path / "two", seed=1, r=2, target_modules=["q_proj"])
    source = opened(plain, one, two)
    before = fingerprint(source)
    assert {"model.safetensors", f"adapter 1/{WEIGHTS}", f"adapter 2/{WEIGHTS}", f"adapter 2/{CONFIG}"} <= before.keys()
    check_fingerprints(source, before)
    edit_json(two / CONFIG, lora_alpha=9)
    with pytest.raises(InputError, match=r"adapter 2/adapter_config\.json of maths has changed"):
        check_fingerprints(source, before)


def test_references_are_split_at_pluses(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(plain, tmp_path / "a+b")
    assert open_source("x", "a+b", place="sources.x", root=tmp_path).changes == {}
    train(plain, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    asked = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options["revision"]))
        return str(plain if repository == "org/model" else tmp_path / "adapter")

    monkeypatch.setattr(places, "snapshot_download", download)
    source = open_source("x", "org/model@v1+org/adapter@v2", place="sources.x")
    assert asked == [("org/model", "v1"), ("org/adapter", "v2")]
    assert len(source.changes) == 2
    assert source.folder == plain


def test_another_base_than_the_adapter_names_is_told(plain: Path, tmp_path: Path) -> None:
    adapter = train(plain, tmp_path, r=2, target_modules=["q_proj"])
    assert opened(plain, adapter).warnings == ()
    edit_json(tmp_path / CONFIG, base_model_name_or_path="org/other-7b")
    assert "was trained on org/other-7b" in opened(plain, adapter).warnings[0]


# ---- refusals ----

Harm = Callable[[Path], object]


def config(**changes: Any) -> Harm:
    return lambda folder: edit_json(folder / CONFIG, **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Harm:
    def harm(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return harm


def bigger(found: dict[str, torch.Tensor]) -> None:
    key = next(key for key in found if "lora_A" in key)
    found[key] = torch.zeros(found[key].shape[0], 20)


def elsewhere(found: dict[str, torch.Tensor]) -> None:
    for key in list(found):
        found[key.replace("layers.1.", "layers.7.")] = found.pop(key)


HALF = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
BAD: dict[str, tuple[Harm, str]] = {
    "IA3": (config(peft_type="IA3"), "are not a vector"),
    "LoKr": (config(peft_type="LOKR", alpha=1), "are not the sides of a Kronecker product"),
    "unknown type": (config(peft_type="HIRA"), "peft_type is 'HIRA'; those that can be folded are ADALORA, BOFT"),
    "no type": (config(peft_type=None), "peft_type is None"),
    "layer replication": (config(layer_replication=[[0, 1], [0, 1]]), "layer_replication is not supported"),
    "activated": (config(alora_invocation_tokens=[1]), "alora_invocation_tokens is not supported"),
    "random start": (config(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    "rank of none": (config(r=0), "r is 0"),
    "alpha not a number": (config(lora_alpha="8"), "lora_alpha is '8'"),
    "another rank": (config(r=5), "the rank of model.layers.0.self_attn.q_proj is 5, but its tensors have 2"),
    "pattern broken": (config(alpha_pattern={"(": 3}), "broken pattern"),
    "pattern of text": (config(rank_pattern={"q": "3"}), "rank_pattern must give numbers"),
    "other width": (tensors(bigger), r"for a model whose model.layers.0.* has shape \[16, 20\]; here it is \[16, 16\]"),
    "other depth": (tensors(elsewhere), "model.layers.7.self_attn.q_proj.weight, which the model does not have"),
    "half a pair": (tensors(lambda t: t.pop(HALF)), "not a pair of matrices"),
    "unknown part": (tensors(lambda t: t.update({HALF.replace("lora_B", "hada_B"): torch.ones(2)})), "does not have"),
    "other vocabulary": (
        tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(40, 16)})),
        "lm_head.weight has shape .40, 16.; here it is .32, 16.\\. .*adds tokens",
    ),
    "integers": (tensors(lambda t: t.update({HALF: t[HALF].to(torch.int8)})), "stored as I8"),
    "pickled": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "holds pickled weights"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
    "no config": (lambda f: (f / CONFIG).unlink(), "is not an adapter"),
    "config not JSON": (lambda f: (f / CONFIG).write_text("{"), "not JSON"),
    "weights cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "cut short"),
}


@pytest.fixture(scope="module")
def adapter(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(plain, tmp_path_factory.mktemp("adapters") / "adapter", r=2, target_modules=["q_proj"])


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters_are_refused(plain: Path, adapter: Path, tmp_path: Path, case: str) -> None:
    harm, words = BAD[case]
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    opened(plain, folder)
    harm(folder)
    with pytest.raises(InputError, match=re.compile(words, re.DOTALL)) as caught:
        opened(plain, folder)
    assert caught.value.place == "sources.maths"


def test_an_adapter_alone_is_told_its_base(adapter: Path) -> None:
    edit_json(adapter / CONFIG, base_model_name_or_path="org/base-7b")
    with pytest.raises(InputError, match=re.escape(f"`org/base-7b+{adapter}`")):
        opened(adapter)


def test_a_plus_with_nothing_behind_it_is_told(plain: Path) -> None:
    with pytest.raises(InputError, match="nothing before or after its plus"):
        open_source("x", "plain+", place="sources.x", root=plain.parent)


@pytest.mark.filterwarnings("ignore")
def test_a_tied_embedding_changes_as_both_or_not_at_all(tmp_path: Path) -> None:
    base = save_model(tiny_config(tie_word_embeddings=True), tmp_path / "base")
    for name, settings in {
        "one": {"target_modules": ["embed_tokens"]},
        "head": {"target_modules": ["lm_head"]},
        "full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }.items():
        with pytest.raises(InputError, match="in this model it is both"):
            opened(base, train(base, tmp_path / name, r=2, **settings))
    both = train(base, tmp_path / "both", r=2, target_modules=["q_proj"])
    new = torch.randn(len(WORDS), 16)
    tensors(
        lambda t: t.update({f"base_model.model.{n}.weight": new.clone() for n in ("lm_head", "model.embed_tokens")})
    )(both)
    assert torch.equal(opened(base, both).read("model.embed_tokens.weight"), new)
    tensors(lambda t: t.update({"base_model.model.lm_head.weight": new + 1}))(both)
    with pytest.raises(InputError, match="in this model it is both"):
        opened(base, both)
