"""DeepSpeed ZeRO checkpoints, cut up here by hand as DeepSpeed cuts them."""

from __future__ import annotations

import enum
import json
import os
import shutil
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import WORDS, save_model, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config

from evomerge.checkpoints.source import open_source
from evomerge.checkpoints.zero import consolidate_zero
from evomerge.errors import InputError

PROMPT = torch.arange(3, 15).reshape(2, 6)
STEP = "global_step7"
DEEPSEEK = DeepseekV3Config(
    vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1,
    n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
    max_position_embeddings=32,
)  # fmt: skip


# ---- an independent builder: slow, one number at a time ----


@contextmanager
def deepspeed_objects() -> Iterator[dict[str, Any]]:
    """Objects that pickle under DeepSpeed's names, which mean nothing when the checkpoint is read."""

    class ZeroStageEnum(int, enum.Enum):
        two = 2
        three = 3

    class LossScaler:
        def __init__(self) -> None:
            self.cur_scale = 1.0

    class fragment_address:  # noqa: N801
        def __init__(self) -> None:
            self.numel, self.start = 3, 4

    kinds = {
        "deepspeed.runtime.zero.config": ZeroStageEnum,
        "deepspeed.runtime.fp16.loss_scaler": LossScaler,
        "deepspeed.utils.tensor_fragment": fragment_address,
    }
    for module, kind in kinds.items():
        kind.__module__, kind.__qualname__ = module, kind.__name__
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            sys.modules.setdefault(name, types.ModuleType(name))
        setattr(sys.modules[module], kind.__name__, kind)
    yield {
        "loss_scaler": LossScaler(),
        "zero_stage": ZeroStageEnum.two,
        "param_slice_mappings": [OrderedDict(x=fragment_address())],
    }
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        sys.modules.pop(name)


def numbers(tensor: torch.Tensor) -> list[float]:
    return [float(x) for x in tensor.flatten()]


def shares_by_group(groups: list[dict[str, torch.Tensor]], world: int, align: int) -> list[list[torch.Tensor]]:
    """ZeRO 1 and 2: what each rank holds of each group, with every parameter at a multiple of ``align``."""
    ranks: list[list[torch.Tensor]] = [[] for _ in range(world)]
    for group in groups:
        line: list[float] = []
        for tensor in group.values():
            line += numbers(tensor) + [-99.0] * (-tensor.numel() % align)
        while len(line) % (2 * world):
            line.append(-99.0)
        size = len(line) // world
        for rank in range(world):
            ranks[rank].append(torch.tensor(line[rank * size : (rank + 1) * size]))
    return ranks


def runs_of(tensor: torch.Tensor, world: int) -> list[list[float]]:
    """ZeRO 3: what each rank holds of one parameter."""
    line = numbers(tensor)
    while len(line) % world:
        line.append(-99.0)
    size = len(line) // world
    return [line[rank * size : (rank + 1) * size] for rank in range(world)]


def shares_singly(groups: list[dict[str, torch.Tensor]], world: int, vector: int) -> list[list[torch.Tensor]]:
    ranks = []
    for rank in range(world):
        line = [x for group in groups for tensor in group.values() for x in runs_of(tensor, world)[rank]]
        ranks.append([torch.tensor(line[i : i + vector]) for i in range(0, len(line), vector)])
    return ranks


def zero_checkpoint(
    state: dict[str, torch.Tensor],
    folder: Path,
    *,
    stage: int,
    world: int,
    frozen: tuple[str, ...] = (),
    buffers: tuple[str, ...] = (),
    shared: dict[str, str] | None = None,
    prefix: str = "",
    objects: bool = True,
    align: int = 1,
) -> Path:
    """Save a model's tensors as DeepSpeed does after training with so many ranks."""
    shared = shared or {}
    trained = {n: t for n, t in state.items() if n not in frozen and n not in buffers and n not in shared}
    # Two groups, as with and without weight decay; neither in the order of the model.
    decay = dict(reversed([(n, t) for n, t in trained.items() if t.ndim > 1]))
    groups = [decay, {n: t for n, t in trained.items() if n not in decay}]
    shapes = [OrderedDict((n, t.shape) for n, t in group.items()) for group in groups]
    step = folder / STEP
    step.mkdir(parents=True)
    (folder / "latest").write_text(STEP)
    shares = shares_by_group(groups, world, align) if stage < 3 else shares_singly(groups, world, vector=1000)
    paddings = [[-t.numel() % align for t in group.values()] for group in groups]
    with deepspeed_objects() as found:
        for rank in range(world):
            optimizer = {
                **(found if objects else {}),
                **({"param_alignment_paddings": paddings} if align > 1 else {}),
                "partition_count": [world, world] if stage < 3 else world,
                "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups": shares[rank],
            }
            name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save({"optimizer_state_dict": optimizer, "ds_version": "0.18.0"}, step / name)
    for rank in range(world if stage == 3 else 1):
        fragments = {
            n: torch.tensor(runs_of(state[n], world)[rank]) if stage == 3 else state[n].clone() for n in frozen
        }
        module = {n: torch.zeros(0) if stage == 3 else state[n].bfloat16() for n in (*trained, *frozen)}
        content = {
            "module": module | {n: state[n].bfloat16() for n in buffers},
            "buffer_names": list(buffers),
            "param_shapes": shapes,
            "frozen_param_shapes": OrderedDict((n, state[n].shape) for n in frozen) if stage > 1 else None,
            "frozen_param_fragments": fragments if stage > 1 else None,
            "shared_params": shared,
            "ds_version": "0.18.0",
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        torch.save(content, step / name)
    return folder


def trained(config: Any, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model in bf16, and what its weights became in float32."""
    save_model(config, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    names = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
    state = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    return folder, {name: tensor for name, tensor in state.items() if name in names}


def check(out: Path, model: Path, state: dict[str, torch.Tensor]) -> None:
    """``out`` is that model with these weights, in plain transformers and here."""
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.float32
    found = loaded.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    source = open_source("x", str(out), place="x")
    assert source.warnings == ()
    assert AutoTokenizer.from_pretrained(out).encode("w1 w2") == AutoTokenizer.from_pretrained(model).encode("w1 w2")
    config = json.loads((model / "config.json").read_text())
    changed = {"dtype": "float32"}
    assert json.loads((out / "config.json").read_text()) == {**config, **changed}


# ---- putting together ----


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_weights_come_back(tmp_path: Path, stage: int, world: int) -> None:
    model, state = trained(tiny_config(hidden_size=12, intermediate_size=7), tmp_path / "model")
    prefix = "bf16_" if stage == 1 else ""
    folder = zero_checkpoint(state, tmp_path / "zero", stage=stage, world=world, prefix=prefix)
    told: list[tuple[int, int]] = []
    consolidate_zero(folder, tmp_path / "out", model, progress=lambda done, of: told.append((done, of)))
    check(tmp_path / "out", model, state)
    assert told[-1] == (len(state), len(state))


def test_parameters_may_be_aligned(tmp_path: Path) -> None:
    """As versions from 0.19 on can do it; it is said beside the shards."""
    model, state = trained(tiny_config(intermediate_size=7), tmp_path / "model")
    folder = zero_checkpoint(state, tmp_path / "zero", stage=2, world=2, align=5)
    consolidate_zero(folder, tmp_path / "out", model)
    check(tmp_path / "out", model, state)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_and_shared_weights(tmp_path: Path, stage: int) -> None:
    model, state = trained(tiny_config(), tmp_path / "model")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied in training, though the model has two
    frozen = ("model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    for name in frozen:
        state[name] = state[name].bfloat16().float()  # as they were read; ZeRO 1 keeps them in half precision alone
    shared = {"lm_head.weight": "model.embed_tokens.weight"}
    folder = zero_checkpoint(state, tmp_path / "zero", stage=stage, world=3, frozen=frozen, shared=shared)
    consolidate_zero(folder, tmp_path / "out", model)
    check(tmp_path / "out", model, state)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_tied_model_is_written_with_one_tensor(tmp_path: Path, stage: int) -> None:
    model, state = trained(tiny_config(tie_word_embeddings=True), tmp_path / "model")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    shared = {"lm_head.weight": "model.embed_tokens.weight"}
    folder = zero_checkpoint(state, tmp_path / "zero", stage=stage, world=2, shared=shared)
    consolidate_zero(folder, tmp_path / "out", model)
    check(tmp_path / "out", model, state)
    assert "lm_head.weight" not in open_source("x", str(tmp_path / "out"), place="x").tensors


@pytest.mark.parametrize("stage", [2, 3])
def test_experts_trained_in_one_tensor_and_buffers(tmp_path: Path, stage: int) -> None:
    model, state = trained(DEEPSEEK, tmp_path / "model")
    buffers = tuple(name for name in state if name.endswith("e_score_correction_bias"))
    for name in buffers:
        state[name] = state[name].bfloat16().float()  # the module is saved in half precision
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    assert buffers
    folder = zero_checkpoint(state, tmp_path / "zero", stage=stage, world=2, buffers=buffers)
    consolidate_zero(folder, tmp_path / "out", model)
    check(tmp_path / "out", model, state)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in open_source("x", str(tmp_path / "out"), place="x").tensors


def test_the_step_is_the_latest_or_the_one_named(tmp_path: Path) -> None:
    model, state = trained(tiny_config(), tmp_path / "model")
    folder = zero_checkpoint(state, tmp_path / "zero", stage=2, world=2)
    (folder / "global_step99").mkdir()
    consolidate_zero(folder, tmp_path / "one", model)
    consolidate_zero(folder / STEP, tmp_path / "two", model)
    (folder / "global_step99").rmdir()
    (folder / "latest").unlink()
    consolidate_zero(folder, tmp_path / "three", model)
    for name in ("one", "two", "three"):
        check(tmp_path / name, model, state)


def test_the_model_may_be_the_checkpoint_itself(tmp_path: Path) -> None:
    """As a trainer writes it: configuration and tokenizer beside the shards."""
    model, state = trained(tiny_config(), tmp_path / "model")
    folder = zero_checkpoint(state, tmp_path / "zero", stage=3, world=2)
    shutil.copytree(model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    consolidate_zero(folder, tmp_path / "out", folder)
    check(tmp_path / "out", model, state)


def test_as_a_source_it_is_told_what_it_is(tmp_path: Path) -> None:
    model, state = trained(tiny_config(), tmp_path / "model")
    folder = zero_checkpoint(state, tmp_path / "zero", stage=2, world=2)
    for place in (folder, folder / STEP):
        with pytest.raises(InputError, match=r"DeepSpeed ZeRO checkpoint.*global_step7.*`evomerge consolidate`"):
            open_source("x", str(place), place="sources.x")
    shutil.copytree(model, folder, dirs_exist_ok=True)
    assert open_source("x", str(folder), place="sources.x").layers == 2


# ---- broken and hostile ----


class Command:
    """Runs a command when it is unpickled by anyone who is not careful."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


Harm = Callable[[Path], object]


def shard(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Harm:
    def harm(step: Path) -> None:
        content = torch.load(step / name, weights_only=False)
        change(content)
        torch.save(content, step / name)

    return harm


def optimizer(change: Callable[[dict[str, Any]], object], rank: int = 0) -> Harm:
    return edit(shard(rank), lambda content: change(content["optimizer_state_dict"]))


def rename(group: dict[str, Any], old: str, new: str) -> None:
    items = [(new if name == old else name, value) for name, value in group.items()]
    group.clear()
    group.update(items)


MODEL = "mp_rank_00_model_states.pt"
GROUPS = "single_partition_of_fp32_groups"
EMBEDDING = "model.embed_tokens.weight"
BAD: dict[str, tuple[Harm, str]] = {
    "a rank too few": (lambda s: (s / shard(1)).unlink(), "saved by 2 ranks, but 1 optimizer states"),
    "the first rank gone": (lambda s: (s / shard(0)).unlink(), "lacks the optim states of rank 0"),
    "a rank of an older run": (lambda s: shutil.copy(s / shard(0), s / shard(2)), "saved by 2 ranks, but 3"),
    "a rank twice": (lambda s: shutil.copy(s / shard(0), s / f"bf16_{shard(0)}"), "has rank 0 twice"),
    "tensor parallel": (
        lambda s: shutil.copy(s / shard(0), s / "zero_pp_rank_0_mp_rank_01_optim_states.pt"), "tensor parallelism"
    ),
    "no model states": (lambda s: (s / MODEL).unlink(), f"has no {MODEL}"),
    "no shards": (lambda s: [f.unlink() for f in s.glob("*optim*")], r"has no zero_pp_rank_\*_optim"),
    "experts of their own": (optimizer(lambda o: o.update(partition_count=[2, 1])), r"cut into \[1, 2\] parts"),
    "too short": (optimizer(lambda o: o[GROUPS].__setitem__(0, o[GROUPS][0][:-9])), "group 0 needs .* elements"),
    "too long": (optimizer(lambda o: o[GROUPS].__setitem__(1, torch.zeros(999))), "group 1 needs .* elements"),
    "a group missing": (optimizer(lambda o: o[GROUPS].pop()), "has 2 groups, the shards have 1"),
    "paddings of fewer": (
        optimizer(lambda o: o.update(param_alignment_paddings=[[0], [0]])), "param_alignment_paddings do not fit"
    ),
    "not ZeRO": (optimizer(lambda o: o.pop(GROUPS)), f"has no {GROUPS}"),
    "integers": (optimizer(lambda o: o[GROUPS].__setitem__(0, torch.ones(4, dtype=torch.int8))), "something else"),
    "no shapes": (edit(MODEL, lambda c: c.pop("param_shapes")), "has no param_shapes"),
    "shapes of text": (edit(MODEL, lambda c: c["param_shapes"][0].update({EMBEDDING: "x"})), "not shapes by name"),
    "shapes below zero": (
        edit(MODEL, lambda c: c["param_shapes"][0].update({EMBEDDING: (-1, 2)})), "not shapes by name"
    ),
    "another name": (
        edit(MODEL, lambda c: [c["module"].pop(EMBEDDING), rename(c["param_shapes"][0], EMBEDDING, "x")]),
        f"has no {EMBEDDING}",
    ),
    "frozen lost": (
        edit(MODEL, lambda c: c["frozen_param_shapes"].update(x=torch.Size([3]))), "has no x, or in an unknown form"
    ),
    "cut short": (lambda s: os.truncate(s / shard(0), 2000), "cannot be read safely"),
    "no checkpoint": (lambda s: (s / shard(0)).write_text("hello"), "cannot be read safely"),
    "a list": (lambda s: torch.save([1], s / shard(0)), "holds no state"),
    "unknown class": (
        edit(MODEL, lambda c: c.update(args=types.SimpleNamespace(a=1))), "needs types.SimpleNamespace to be read"
    ),
}  # fmt: skip


@pytest.fixture
def broken(tmp_path: Path) -> tuple[Path, Path]:
    """A whole checkpoint of plain contents, to be harmed."""
    model, state = trained(tiny_config(), tmp_path / "model")
    folder = zero_checkpoint(state, tmp_path / "zero", stage=2, world=2, objects=False)
    return folder, model


@pytest.mark.parametrize("case", BAD)
def test_broken_checkpoints_are_refused(broken: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    folder, model = broken
    harm, words = BAD[case]
    consolidate_zero(folder, tmp_path / "whole", model)
    harm(folder / STEP)
    with pytest.raises(InputError, match=words) as caught:
        consolidate_zero(folder, tmp_path / "out", model)
    assert caught.value.place == str(folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [MODEL, shard(1)])
def test_nothing_in_a_checkpoint_is_run(broken: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    folder, model = broken
    content = torch.load(folder / STEP / name)
    torch.save({**content, "x": Command(tmp_path / "mark")}, folder / STEP / name)
    with pytest.raises(InputError, match=r"needs (posix|nt)\.system to be read, which could run code"):
        consolidate_zero(folder, tmp_path / "out", model)
    assert not (tmp_path / "mark").exists()
    torch.load(folder / STEP / name, weights_only=False)
    assert (tmp_path / "mark").exists()


def test_the_latest_step_lies_in_the_folder(broken: tuple[Path, Path], tmp_path: Path) -> None:
    folder, model = broken
    shutil.move(folder / STEP, tmp_path / "elsewhere")
    for tag in ("../elsewhere", str(tmp_path / "elsewhere"), ""):
        (folder / "latest").write_text(tag)
        with pytest.raises(InputError, match="is not a DeepSpeed ZeRO checkpoint"):
            consolidate_zero(folder, tmp_path / "out", model)


def test_a_model_of_another_shape_is_told(broken: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = broken
    other = save_model(tiny_config(intermediate_size=32), tmp_path / "other")
    with pytest.raises(InputError, match=r"has shape \[24, 16\]; .* asks for \[32, 16\]"):
        consolidate_zero(folder, tmp_path / "out", other)
