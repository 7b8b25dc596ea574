"""Workers of several GPUs: what they need of each, against models built without memory, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_miniature import evomerge, search_file
from helpers_sparse import CHECKPOINT_BYTES, config_of, sparse_checkpoint
from helpers_tiers import nightly_but

from evomerge.checkpoints.placement import device_bytes, spread_layers
from evomerge.checkpoints.sharding import shard_bytes, sharding_problem
from evomerge.checkpoints.source import open_source
from evomerge.checkpoints.structure import empty_model, layer_stack, parse_config, stored_tensors
from evomerge.errors import InputError
from evomerge.report.fit import check_memory
from evomerge.report.hardware import (
    GPUS,
    ModelShape,
    Work,
    estimate,
    layout_lines,
    layouts,
    lines,
    model_shape,
    needs,
    worker_bytes,
)
from evomerge.report.plan import layer_bytes
from evomerge.search.settings.search_file import load_search_file

GB = 10**9
ANSWERS = Work(prompts=200, prompt_tokens=256, new_tokens=256, batch_size=16)
# Four matrices of attention, three of the feed-forward block, two norms; two bytes a number.
LLAMA_70B_LAYERS = [2 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192)] * 80
MODELS = nightly_but(["qwen2.5-7b"], CHECKPOINT_BYTES)


def shape_of(name: str, folder: Path) -> ModelShape:
    """What `validate` computes with, of three such sources."""
    source = open_source(name, str(sparse_checkpoint(name, folder / name)), place=name)
    weights = sum(entry.end - entry.begin for entry in source.tensors.values())
    sizes = layer_bytes(source, source.layers)
    return model_shape(source.config, weights, 3 * weights, source.layers, source.dtype.itemsize, sizes)


@pytest.mark.parametrize("name", MODELS)
def test_what_a_worker_needs_is_what_its_model_takes_when_it_is_built(name: str, tmp_path: Path) -> None:
    shape = shape_of(name, tmp_path)
    assert shape.weights == CHECKPOINT_BYTES[name]
    model = empty_model(parse_config(config_of(name), name), name, torch.bfloat16)
    _, layers = layer_stack(model, shape.layers)
    sizes = [sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in layers]
    outside = sum(tensor.nbytes for tensor in stored_tensors(model).values()) - sum(sizes)
    cache = cache_bytes(model)
    for devices in (1, 2, 4, 8):
        held = device_bytes(outside, sizes, spread_layers(outside, sizes, devices), devices)
        counted = [
            weights + sum(cache[layer] for layer in range(len(layers)) if shape.placed(devices)[layer] == device)
            for device, weights in enumerate(held)
        ]
        predicted = [need.weights + need.scratch for need in needs(shape, [ANSWERS], "transformers", devices)]
        assert predicted == pytest.approx(counted, rel=0.1)
        assert max(held) < 1.25 * shape.weights / devices  # no device is left with much more than its share


def cache_bytes(model: Any) -> list[int]:
    """Bytes of keys and values of a batch, by layer, as the model itself makes them."""
    model.config._experts_implementation = "grouped_mm"
    tokens = torch.zeros(ANSWERS.batch_size, ANSWERS.prompt_tokens + ANSWERS.new_tokens, dtype=torch.int64)
    with torch.inference_mode():
        cache = model(tokens.to("meta"), use_cache=True, logits_to_keep=1).past_key_values
    return [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]


@pytest.mark.parametrize(
    ("outside", "layers", "devices", "placed"),
    [
        (0, [5, 5, 5, 5], 2, [0, 0, 1, 1]),
        (10, [5, 5, 5, 5], 2, [0, 1, 1, 1]),
        (100, [5, 5, 5, 5], 3, [1, 1, 2, 2]),  # the embedding alone is more than a share
        (0, [5, 5, 5, 5, 20], 2, [0, 0, 0, 0, 1]),
        (7, [1, 2, 3], 1, [0, 0, 0]),
    ],
)
def test_layers_share_out_the_devices(outside: int, layers: list[int], devices: int, placed: list[int]) -> None:
    assert spread_layers(outside, layers, devices) == placed


@pytest.mark.parametrize(
    ("name", "devices", "problem"),
    [
        ("qwen2.5-7b", 8, "its 28 attention heads are not divided by 8 (28 / 8 leaves 4)"),
        ("qwen2.5-7b", 3, "(28 / 3 leaves 1)"),
        ("qwen2.5-32b", 16, "its 40 attention heads are not divided by 16"),
        ("llama-2-13b", 16, "(40 / 16 leaves 8)"),
        ("mixtral-8x7b", 5, "(32 / 5 leaves 2)"),
    ],
)
def test_what_tensor_parallelism_does_not_divide(name: str, devices: int, problem: str) -> None:
    assert problem in sharding_problem(config_of(name), devices)


def test_heads_of_keys_divide_or_are_divided_and_widths_are_divided() -> None:
    config = {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 96, "intermediate_size": 132}
    assert [sharding_problem(config, devices) for devices in (1, 2, 4, 12)] == [""] * 4
    assert "4 heads of keys and values are neither divided by 6 nor divide it" in sharding_problem(config, 6)
    assert "(4 / 3 leaves 1, 3 / 4 leaves 3)" in sharding_problem(config, 3)
    assert "its intermediate_size of 130 is not divided by 4" in sharding_problem(
        config | {"intermediate_size": 130}, 4
    )
    assert sharding_problem({"text_config": config}, 5) == sharding_problem(config, 5) != ""
    assert sharding_problem({"hidden_size": 64}, 3) == ""  # no attention


def test_a_shard_holds_its_share_and_one_head_of_keys_at_least() -> None:
    config = config_of("qwen2.5-7b")
    whole = CHECKPOINT_BYTES["qwen2.5-7b"]
    assert shard_bytes(config, whole, 28, 2, 4) == whole / 4
    # On 28 devices each of the four heads lies seven times: 28 layers x 2 matrices x 3584 x 128 numbers of 2 bytes.
    assert shard_bytes(config, whole, 28, 2, 28) == round(whole / 28 + 28 * 2 * 3584 * 128 * 2 * (1 - 4 / 28))


def test_which_layouts_of_a_70b_fit_on_which_gpus(tmp_path: Path) -> None:
    config, weights = config_of("llama-3-70b"), CHECKPOINT_BYTES["llama-3-70b"]
    shape = model_shape(config, weights, 3 * weights, 80, 2, LLAMA_70B_LAYERS)
    found = {
        gpu.name: [n for n in (1, 2, 4, 8) if estimate(gpu, shape, [ANSWERS], "transformers", 0, n).workers]
        for gpu in GPUS
    }
    assert found == {
        "A100-40": [4, 8], "A100-80": [2, 4, 8], "H100-80": [2, 4, 8], "H200-141": [1, 2, 4, 8], "L40S-48": [4, 8],
        "RTX 4090-24": [8], "B200-180": [1, 2, 4, 8], "B300-288": [1, 2, 4, 8],
    }  # fmt: skip
    assert layouts(shape, "vllm") == (1, 2, 4, 8)
    header, *rows = layout_lines(shape, [ANSWERS], 0)
    assert header.startswith("on each GPU of a worker: transformers 144.9 GB on 1, ")
    assert rows[1] == "A100-80: transformers on 2 (mapped), 4 (mapped), 8 (mapped); vllm on 8 (mapped)"
    assert lines(shape, [ANSWERS], "transformers", 0, 4)[0].startswith(
        "A100-40: 37.7 GB on each of 4 GPUs, room for one"
    )
    assert estimate(GPUS[3], shape, [ANSWERS], "transformers", 0, 8).workers == 1  # though seven would fit on each


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("cluster.gpus_per_worker=1.5", "is 1.5: a worker has a share of one GPU, or whole ones. Give 1 or 2"),
        ("cluster.gpus_per_worker=2.25", "Give 2 or 3"),
        ("cluster.gpus_per_worker=32", "is 32 GPUs on one node, and no node has more than 16"),
        ("cluster.gpus_per_worker=8", "is 8, and the model has 6 layers: 2 of the GPUs would have none"),
        ("cluster.gpus_per_worker=7", "and the model has 6 layers: 1 of the GPUs would have none"),
    ],
)
def test_a_worker_that_no_node_can_have_is_refused(
    setting: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evomerge("validate", search_file(tmp_path, pool="ray"), "--set", setting) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["device=cuda:1"], "is 4, and device: cuda:1 names one device"),
        (["device=cpu"], "is 4, and device: cpu names one device"),
        (["engine=vllm", "cluster.gpus_per_worker=3"], "its 4 attention heads are not divided by 3 (4 / 3 leaves 1)"),
        (["pool=in_process"], "is 4, and this machine has 0 GPUs: 4 are missing"),
        (["pool=ray"], "is 4, and this machine has 0 GPUs: 4 are missing"),
    ],
)
def test_devices_that_are_not_there_or_do_not_divide_the_model_are_refused(
    settings: list[str],
    problem: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    changes = [argument for setting in settings for argument in ("--set", setting)]
    assert evomerge("validate", search_file(tmp_path), "--set", "cluster.gpus_per_worker=4", *changes) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("devices", "residency", "memory", "problem", "hint"),
    [
        (
            2,
            "auto",
            50,
            "is 2, and the fullest GPU of a worker needs 73.3 GB (weights 70.9 GB +",
            "It fits on 4 or 8",
        ),
        (4, "auto", 21, "the GPU has 21.0 GB: 16.7 GB too little", "It fits on 8 GPUs a worker."),
        (2, "auto", 10, "CUDA 1.1 GB", "It fits on no usual number of such GPUs."),
        (4, "device", 80, "+ sources", "Leave the sources in the host's memory"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused_with_the_sum(
    devices: int, residency: str, memory: int, problem: str, hint: str, tmp_path: Path
) -> None:
    config, weights = config_of("llama-3-70b"), CHECKPOINT_BYTES["llama-3-70b"]
    shape = model_shape(config, weights, 3 * weights, 80, 2, LLAMA_70B_LAYERS)
    changes = [f"cluster.gpus_per_worker={devices}", f"cluster.residency={residency}"]
    file = load_search_file(search_file(tmp_path), changes)
    with pytest.raises(InputError) as refused:
        check_memory(file, shape, [ANSWERS], memory * GB, "the GPU")
    assert refused.value.place == "cluster.gpus_per_worker"
    assert problem in refused.value.problem
    assert hint in str(refused.value.hint)
    check_memory(file, shape, [ANSWERS], worker_bytes(shape, [ANSWERS], "transformers", devices) * 4, "the GPU")
