"""Estimates for GPUs, against sums made by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.report.hardware import (
    GPUS,
    Gpu,
    ModelShape,
    Work,
    descent_bytes,
    estimate,
    host_bytes,
    lines,
    merge_seconds,
    model_shape,
    scratch_bytes,
    work_of,
    work_seconds,
    worker_bytes,
)

GIB = 2**30
MISTRAL = {
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "num_hidden_layers": 32,
    "vocab_size": 32000,
}  # fmt: skip
# Figures that divide evenly: a bus of 40 GB/s that gives 30, a memory of 1000 GB/s that gives 700, 100 TFLOPS that
# give 50.
ROUND = Gpu("round", 100 * GIB, 1000e9, 100e12, 40e9)
BIG = ModelShape(weights=14 * 10**9, sources=42 * 10**9, layers=10, cache=10**5, vocabulary=10**4)


def test_the_cache_of_a_known_model() -> None:
    # Mistral 7B keeps 128 KiB of bfloat16 keys and values a token: 2 x 32 layers x 8 heads x 128 numbers x 2 bytes.
    assert model_shape(MISTRAL, 14, 28, 32, 2).cache == 128 * 1024
    assert model_shape({"text_config": MISTRAL}, 14, 28, 64, 2).cache == 256 * 1024
    every_head = {key: value for key, value in MISTRAL.items() if key != "num_key_value_heads"}
    assert model_shape(every_head, 14, 28, 32, 2).cache == 512 * 1024
    assert model_shape(MISTRAL | {"head_dim": 64}, 14, 28, 32, 2).cache == 64 * 1024


def test_scratch_is_the_cache_of_a_batch_or_the_logits_of_whole_prompts() -> None:
    answers = Work(prompts=100, prompt_tokens=300, new_tokens=200, batch_size=8)
    assert scratch_bytes(BIG, answers) == 8 * 500 * 10**5 + 8 * 10**4 * 6
    likely = Work(prompts=4, prompt_tokens=300, new_tokens=0, batch_size=8)  # fewer prompts than a batch holds
    assert scratch_bytes(BIG, likely) == 4 * 300 * 10**5 + 4 * 300 * 10**4 * 6


def test_a_worker_needs_its_weights_the_largest_scratch_and_with_vllm_twice_what_that_wants() -> None:
    small, large = Work(8, 100, 100, 1), Work(8, 100, 100, 8)
    scratch = 8 * 200 * 10**5 + 8 * 10**4 * 6
    assert worker_bytes(BIG, [small, large], "transformers") == 14 * 10**9 + scratch + GIB
    # vLLM gets half of what is free beside the live model, and needs the weights and the scratch in it.
    assert worker_bytes(BIG, [large, small], "vllm") == 14 * 10**9 + 2 * (14 * 10**9 + scratch) + GIB
    no_answers = Work(8, 100, 0, 1)
    assert worker_bytes(BIG, [no_answers], "vllm") == worker_bytes(BIG, [no_answers], "transformers")


def test_a_descent_keeps_what_was_measured_or_a_share_of_what_is_free() -> None:
    """SmolLM2-135M in bfloat16, 1,885 tokens in one pass: a worker's peak rose from 1.18 to 3.58 GB."""
    config = {"vocab_size": 49152, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    shape = model_shape(config, 269_000_000, 0, 30, 2)
    assert descent_bytes(shape, 7, 10**12) == pytest.approx(1792 / 1885 * 2.4e9, rel=0.1)
    assert descent_bytes(shape, 64, 4 * 10**9) == 10**9
    assert host_bytes(shape, [], 0, 10**9) - host_bytes(shape, [], 0) == 10**9


def test_merging_takes_as_long_as_reading_the_sources() -> None:
    written = 14 / 700
    assert merge_seconds(BIG, ROUND, "device") == pytest.approx(42 / 700 + written)
    assert merge_seconds(BIG, ROUND, "pinned") == pytest.approx(42 / 30 + written)
    assert merge_seconds(BIG, ROUND, "mapped") == pytest.approx(42 / 15 + written)


def test_prompts_are_bound_by_arithmetic_and_answers_by_memory() -> None:
    # 7e9 parameters x 2 operations x 1000 prompts x 100 tokens at 50 TFLOPS: 28 s; ten rounds of ten layers at 0.7 ms.
    prompts = Work(prompts=1000, prompt_tokens=100, new_tokens=0, batch_size=100)
    assert work_seconds(BIG, ROUND, prompts, "transformers") == pytest.approx(28 + 10 * 10 * 0.7e-3)
    # Each of 10 x 50 steps reads 14 GB of weights and 100 x (100 + 25) x 1e5 bytes of cache at 700 GB/s.
    answers = Work(prompts=1000, prompt_tokens=100, new_tokens=50, batch_size=100)
    step = (14e9 + 1.25e9) / 700e9
    assert work_seconds(BIG, ROUND, answers, "transformers") == pytest.approx(28 + 500 * step)


def test_a_small_model_is_bound_by_launching_its_layers() -> None:
    small = ModelShape(weights=10**6, sources=10**6, layers=30, cache=10, vocabulary=10)
    work = Work(prompts=10, prompt_tokens=1, new_tokens=100, batch_size=10)
    assert work_seconds(small, ROUND, work, "transformers") == pytest.approx(100 * 30 * 0.7e-3, rel=1e-3)
    assert work_seconds(small, ROUND, work, "vllm") == pytest.approx(100 * 30 * 0.05e-3, rel=1e-3)


def test_where_sources_lie_and_how_many_workers_have_room() -> None:
    work = Work(prompts=8, prompt_tokens=100, new_tokens=100, batch_size=8)
    on = estimate(ROUND, BIG, [work], "transformers", 0)
    # 107.4 GB hold seven workers of 15.2 GB; the sources' 42 GB lie beside one of them, with a quarter to spare.
    assert (on.workers, on.residency) == (7, "device")
    assert on.seconds == pytest.approx(
        merge_seconds(BIG, ROUND, "device") + work_seconds(BIG, ROUND, work, "transformers")
    )
    tight = Gpu("tight", 40 * GIB, 1000e9, 100e12, 40e9)
    assert estimate(tight, BIG, [work], "transformers", 84 * 10**9).residency == "pinned"
    assert estimate(tight, BIG, [work], "transformers", 83 * 10**9).residency == "mapped"
    none = estimate(Gpu("none", 15 * 10**9, 1000e9, 100e12, 40e9), BIG, [work], "transformers", 0)
    assert (none.workers, none.residency, none.seconds) == (0, None, math.inf)


def test_a_7b_search_on_the_gpus_that_people_have() -> None:
    shape = model_shape(MISTRAL, 14_483_464_192, 3 * 14_483_464_192, 32, 2)
    work = Work(prompts=200, prompt_tokens=256, new_tokens=256, batch_size=16)
    found = {gpu.name: estimate(gpu, shape, [work], "transformers", 0) for gpu in GPUS}
    # Weights 14.48 GB, CUDA 1.07 GB, 16 x 512 tokens of 128 KiB 1.07 GB, logits of 16 tokens 3 MB.
    assert {round(each.need / 1e9, 2) for each in found.values()} == {16.63}
    assert {name: each.workers for name, each in found.items()} == {
        "A100-40": 2, "A100-80": 5, "H100-80": 5, "H200-141": 9, "L40S-48": 2, "RTX 4090-24": 1,
        "B200-180": 11, "B300-288": 17,
    }  # fmt: skip
    assert [name for name, each in found.items() if each.residency == "device"] == [
        "A100-80", "H100-80", "H200-141", "B200-180", "B300-288",
        # 85.9 GB less 15.6 of a worker and a quarter to spare leave 48.8 for 43.5
    ]  # fmt: skip
    told = lines(shape, [work], "vllm", 0)
    assert told[0] == "A100-40: too small for a worker (46.7 GB a worker)"
    assert "A100-80: 46.7 GB a worker, room for one, sources mapped; up to" in told[1]


def test_what_an_evaluator_asks_for() -> None:
    mgsm = SimpleNamespace(max_new_tokens=1024, batch_size=16)
    assert work_of(mgsm, ["exact"], 250) == Work(250, 256, 1024, 16)
    task = SimpleNamespace(generation={"max_gen_toks": 512}, batch_size="auto")
    assert work_of(task, ["exact_match,flexible-extract"], 9) == Work(9, 256, 512, 64)
    assert work_of(SimpleNamespace(generation={}, batch_size=4), ["exact_match"], 9) == Work(9, 256, 256, 4)
    assert work_of(SimpleNamespace(generation={}, batch_size=4), ["acc"], 9) == Work(9, 256, 0, 4)


@given(
    st.integers(10**6, 10**12), st.integers(10**6, 10**12), st.integers(1, 5000), st.integers(0, 2000),
    st.integers(1, 256), st.sampled_from(GPUS),
)  # fmt: skip
def test_a_better_gpu_is_never_slower_and_more_work_never_quicker(
    weights: int, sources: int, prompts: int, new: int, batch: int, gpu: Gpu
) -> None:
    shape = ModelShape(weights, sources, 32, 10**5, 32000)
    work = Work(prompts, 256, new, batch)
    better = Gpu("better", gpu.memory, 2 * gpu.bandwidth, 2 * gpu.flops, 2 * gpu.bus)
    one, other = (estimate(each, shape, [work], "transformers", 0).seconds for each in (gpu, better))
    assert other <= one
    assert work_seconds(shape, gpu, work, "transformers") <= work_seconds(
        shape, gpu, Work(prompts + 1, 256, new, batch), "transformers"
    )
