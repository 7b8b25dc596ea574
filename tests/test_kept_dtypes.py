"""Tensors that stay in float32 in a model of 16 bits: live, merged, exported and reloaded they are the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import edit_json, edit_tensors, save_model
from safetensors.torch import load_file
from test_layer_places import config_of, load
from test_paths import CPU, answer, copy_of, open_both
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.live import live_model
from evomerge.merging.building.export import write_model
from evomerge.merging.materialise import Materialiser
from evomerge.recipes.base import DType
from evomerge.recipes.stack import Blend, StackRecipe

# What transformers keeps in float32 in a model of this dtype: a pattern of the names.
CASES: dict[str, tuple[str, DType, str]] = {
    "a bias of routers": ("deepseek_v3", "bfloat16", "e_score_correction_bias"),
    "a bias of routers, in float16": ("glm4_moe", "float16", "e_score_correction_bias"),
    "routers": ("ernie4_5_moe", "bfloat16", "gate.weight|correction_bias"),
    "norms in float16 alone": ("gpt_oss", "float16", "norm"),
    "none in bfloat16": ("gpt_oss", "bfloat16", ""),
    "a decay": ("rwkv", "float16", "time_decay|time_first"),
}


def is_kept(name: str, part: str) -> bool:
    return bool(part) and re.search(part, name) is not None


def save_both(case: str, dtype: DType, folder: Path, *, wide: bool) -> Any:
    """Models of 16 bits, whose tensors that are kept in float32 have more digits; or not, if not ``wide``."""
    model_type, _, part = CASES[case]
    for seed, name in enumerate("ab"):
        save_model(config_of(model_type), folder / name, seed=seed, dtype=torch.float32)

        def narrow(tensors: dict[str, torch.Tensor], seed: int = seed) -> None:
            generator = torch.Generator().manual_seed(seed)
            for key, tensor in tensors.items():
                if "bias" in key:  # which are zero in a new model
                    tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
                tensors[key] = tensor if wide and is_kept(key, part) else tensor.to(getattr(torch, dtype))

        edit_tensors(folder / name, narrow)
        edit_json(folder / name / "config.json", dtype=dtype)
    return open_both(folder)


MEAN = Blend(method="linear", sources=("a", "b"), parameters={"weight": {"a": 0.3, "b": 0.6}, "normalize": False})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wide", [True, False], ids=["stored in float32", "stored in 16 bits"])
def test_a_tensor_that_is_kept_in_float32_is_so_everywhere(case: str, wide: bool, tmp_path: Path) -> None:
    _, dtype, part = CASES[case]
    sources = save_both(case, dtype, tmp_path, wide=wide)
    live, materialiser = live_model(sources["a"], CPU), Materialiser(sources)

    alone = StackRecipe.uniform(copy_of("b"), sources={"a": "a", "b": "b"}, tokenizer="a", layers=2)
    materialiser.write(alone, live)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto").eval()
    assert torch.equal(answer(live.model), answer(plain))

    merged = StackRecipe.uniform(MEAN, sources={"a": "a", "b": "b"}, tokenizer="a", layers=2)
    materialiser.write(merged, live)
    write_model(merged, sources, tmp_path / "out", texts={})
    assert torch.equal(answer(live.model), answer(load(tmp_path / "out")))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    kept = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in tensors if is_kept(name, part)}
    assert bool(kept) == bool(part)
    for name in kept:
        assert torch.equal(live.tensors[name], tensors[name])


def test_a_dtype_that_is_asked_for_is_of_the_others(tmp_path: Path) -> None:
    sources = save_both("a bias of routers", "bfloat16", tmp_path, wide=True)
    assert not any(source.warnings for source in sources.values())
    for dtype in ("float16", "float32"):
        recipe = StackRecipe.uniform(MEAN, sources={"a": "a", "b": "b"}, tokenizer="a", layers=2, dtype=dtype)
        write_model(recipe, sources, tmp_path / dtype, texts={})
        dtypes = {n: str(t.dtype) for n, t in load_file(tmp_path / dtype / "model.safetensors").items()}
        assert {d for n, d in dtypes.items() if "e_score_correction_bias" not in n} == {f"torch.{dtype}"}
        assert {d for n, d in dtypes.items() if "e_score_correction_bias" in n} == {"torch.float32"}
        live = live_model(sources["a"], CPU, getattr(torch, dtype))
        Materialiser(sources).write(recipe, live)
        assert torch.equal(answer(live.model), answer(load(tmp_path / dtype)))
