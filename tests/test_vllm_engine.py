"""The vLLM engine on a made-up vLLM: what it asks of it, and what it refuses. scripts/test-vllm has the real one."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_miniature import MINIATURES

from evomerge.checkpoints.layered import LayerSetting
from evomerge.checkpoints.live import LiveModel, live_model, load_weights
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.stack import Step
from evomerge.errors import InputError
from evomerge.inference.transformers_engine import generate
from evomerge.inference.vllm_engine import VllmEngine, check_paths
from evomerge.inference.vllm_worker import SharedWeights, places_of

PROMPTS = ["問題: 3個と4個で何個ですか。\n答え:", "問題: 12 + 30 は?\n答え:", "Problem: 5 + 8?\nAnswer:"]
HEADS = "vllm.model_executor.layers.vocab_parallel_embedding"


class MadeUpWorker(SharedWeights):
    """A worker of it, with the real extension. ``taken`` are the bytes that it was handed of each tensor."""

    def __init__(self, rank: int, live: LiveModel) -> None:
        self.rank, self.get_model, self._live = rank, lambda: live.model, live
        self.taken: dict[str, int] = {}

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        tensors = dict(weights_iterator)
        self.taken = {name: tensor.nbytes for name, tensor in tensors.items()}
        load_weights(self._live, tensors.items())


class MadeUpLlm:
    """A second transformers model behind vLLM's words, with a cache of answers that knows prompts and not weights."""

    takes_weights = True
    empties = True

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        source = open_source("served", str(arguments["model"]), place="served")
        hops = arguments["hf_overrides"].get("num_hidden_layers", source.layers)
        self._live = live_model(source, torch.device("cpu"), getattr(torch, arguments["dtype"]), hops)
        assert self._live.stack is not None
        self._live.stack.lay([Step(n, min(n, source.layers - 1)) for n in range(hops)])
        load_weights(self._live, ((n, torch.full_like(t, 0.01)) for n, t in self._live.tensors.items()))
        self._cache: dict[tuple[int, ...], list[int]] = {}
        self.workers = [MadeUpWorker(rank, self._live) for rank in range(arguments.get("tensor_parallel_size", 1))]

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        if not self.takes_weights:
            return []
        assert len(self.workers) == 1 or pickle.dumps((args, kwargs))  # what processes are told must travel
        return [getattr(worker, method)(*args, **(kwargs or {})) for worker in self.workers]

    def apply_model(self, function: Any) -> None:
        function(self._live.model)

    def reset_prefix_cache(self) -> bool:
        self._cache.clear()
        return self.empties

    def generate(self, asked: Sequence[Any], settings: Any, use_tqdm: bool) -> list[Any]:
        wanted = settings if isinstance(settings, list) else [settings] * len(asked)
        assert all(each.temperature == 0 for each in wanted)
        return [self._output(tuple(p.prompt_token_ids), each) for p, each in zip(asked, wanted, strict=True)]

    def _output(self, prompt: tuple[int, ...], settings: Any) -> Any:
        if prompt not in self._cache or len(self._cache[prompt]) < settings.max_tokens:
            self._cache[prompt] = self._go_on(prompt, settings)
        tokens = self._cache[prompt]
        for count in range(1, len(tokens) + 1):
            text = self._live.tokenizer.decode(tokens[:count])
            if tokens[count - 1] in (settings.stop_token_ids or ()) or any(
                stop in text for stop in settings.stop or ()
            ):
                tokens = tokens[:count]
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)])

    def _go_on(self, prompt: tuple[int, ...], settings: Any) -> list[int]:
        tokens = list(prompt)
        for _ in range(settings.max_tokens):
            tokens.append(int(self._live.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(prompt) :]


def _settings(**arguments: Any) -> Any:
    return SimpleNamespace(**{"stop": (), "stop_token_ids": ()} | arguments)


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    found = ModuleType("vllm")
    found.__dict__["LLM"] = type("Llm", (MadeUpLlm,), {})
    found.__dict__["SamplingParams"] = _settings
    found.__dict__["TokensPrompt"] = lambda **given: SimpleNamespace(**given)
    heads = ModuleType(HEADS)
    heads.__dict__["ParallelLMHead"] = type("ParallelLMHead", (), {})
    monkeypatch.setitem(sys.modules, "vllm", found)
    monkeypatch.setitem(sys.modules, HEADS, heads)
    for name in (
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_LOGGING_LEVEL",
        "VLLM_NO_USAGE_STATS",
        "VLLM_WORKER_MULTIPROC_METHOD",
    ):
        monkeypatch.setenv(name, "1")  # so that what an engine sets is taken back
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    return {name: open_source(name, str(MINIATURES / name), place=name) for name in ("maths", "japanese")}


@pytest.fixture
def live(sources: dict[str, Source]) -> LiveModel:
    built = live_model(sources["maths"], torch.device("cpu"), torch.float32)
    fill(built, sources["maths"])
    return built


def fill(live: LiveModel, source: Source) -> None:
    load_weights(live, ((name, source.read(name)) for name in live.tensors))


def both(live: LiveModel, engine: VllmEngine, stop: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """What transformers answers, and what the engine does."""
    return generate(live, PROMPTS, 16, stop, 4), generate(live, PROMPTS, 16, stop, 4, engine)


@pytest.mark.parametrize("stop", [(), ("答え", " so"), (" =", "は", "。")])
def test_the_text_is_that_of_transformers(live: LiveModel, sources: dict[str, Source], stop: Sequence[str]) -> None:
    engine = VllmEngine(sources["maths"], live)
    engine.load(live)
    expected, found = both(live, engine, stop)
    assert found == expected
    assert all(expected)


def test_no_candidate_gets_an_answer_of_another(live: LiveModel, sources: dict[str, Source]) -> None:
    engine = VllmEngine(sources["maths"], live)
    answers = []
    for name in ("maths", "japanese", "maths"):
        fill(live, sources[name])
        engine.load(live)
        expected, found = both(live, engine)
        assert found == expected
        answers.append(found)
    assert answers[0] == answers[2] != answers[1]


def test_what_is_asked_of_vllm(live: LiveModel, sources: dict[str, Source]) -> None:
    asked = VllmEngine(sources["maths"], live)._llm.arguments
    assert asked["load_format"] == "dummy"
    assert asked["dtype"] == "float32"
    assert asked["max_model_len"] == 256
    assert asked["enable_prefix_caching"] is True
    assert asked["enforce_eager"] is True  # compiled code would keep the weights that it was compiled for, on a CPU


def test_on_a_gpu_it_asks_for_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    from evomerge.inference.vllm_engine import _memory

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 80))
    assert _memory([torch.device("cuda", 0)]) == {"gpu_memory_utilization": pytest.approx(0.375)}


def test_several_gpus_give_what_the_fullest_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from evomerge.inference.vllm_engine import _memory

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 - 20 * device.index, 80))
    assert _memory([torch.device("cuda", n) for n in (0, 1)]) == {"gpu_memory_utilization": pytest.approx(0.25)}


def test_devices_of_the_live_model_divide_that_of_vllm(sources: dict[str, Source]) -> None:
    live = live_model(sources["maths"], (torch.device("cpu"), torch.device("cpu")), torch.float32)
    engine = VllmEngine(sources["maths"], live)
    asked = engine._llm.arguments
    assert (asked["tensor_parallel_size"], asked["distributed_executor_backend"]) == (2, "mp")
    module, _, name = asked["worker_extension_cls"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is SharedWeights
    answers = []
    for source in ("maths", "japanese"):
        fill(live, sources[source])
        engine.load(live)
        expected, actual = both(live, engine)
        assert actual == expected
        answers.append(actual)
    assert answers[0] != answers[1]
    for worker in engine._llm.workers:
        assert worker.taken == {name: tensor.nbytes for name, tensor in live.tensors.items()}


def test_weights_are_told_of_and_not_sent(live: LiveModel) -> None:
    messages = places_of(live.tensors.items(), 2)
    assert sum(map(len, messages)) < 0.1 * sum(tensor.nbytes for tensor in live.tensors.values())
    name, tensor = next(iter(live.tensors.items()))
    for message in messages:
        there = dict(pickle.loads(message))
        assert torch.equal(there[name], tensor)
        tensor[0] += 1.0  # the same memory
        assert torch.equal(there[name], tensor)


def test_weights_that_do_not_arrive_are_noticed(
    live: LiveModel, sources: dict[str, Source], vllm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm.LLM, "takes_weights", False)
    with pytest.raises(InputError, match="computes another model"):
        VllmEngine(sources["maths"], live).load(live)


def test_a_cache_that_stays_is_an_error(
    live: LiveModel, sources: dict[str, Source], vllm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm.LLM, "empties", False)
    with pytest.raises(RuntimeError, match="prefix cache"):
        VllmEngine(sources["maths"], live).load(live)


PATHS = {
    "plain": [Step(layer, layer) for layer in range(6)],
    "skips": [Step(layer, layer) for layer in (0, 1, 2, 3, 4)],
    "repeats": [Step(layer, layer) for layer in (0, 1, 2, 2, 3, 3, 4, 5)],
    "swaps": [Step(layer, layer) for layer in (1, 0, 2, 3, 4, 5)],
    "scaled": [Step(layer, layer, 0.5 if layer > 2 else 1.25) for layer in range(6)],
}


def test_one_engine_serves_paths_of_every_length(live: LiveModel, sources: dict[str, Source]) -> None:
    engine = VllmEngine(sources["maths"], live, hops=8)
    assert live.stack is not None
    plain, seen = generate(live, PROMPTS, 16, (), 4), []
    for path in [*PATHS.values(), PATHS["plain"]]:
        live.stack.lay(path)
        engine.load(live)
        expected, answered = both(live, engine)
        assert answered == expected
        seen.append(expected)
    assert seen[0] == seen[-1] == plain
    assert all(answers != plain for answers in seen[1:-1])


def test_a_shorter_path_writes_zero_behind_its_end(live: LiveModel, sources: dict[str, Source]) -> None:
    assert live.stack is not None
    live.stack.lay(PATHS["skips"])
    weights = dict(VllmEngine(sources["maths"], live)._weights(live))
    assert weights.keys() == set(sources["maths"].tensors)
    zero = {name for name, tensor in weights.items() if not tensor.any()}
    assert zero == {f"model.layers.5.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")}


def test_the_engine_has_a_layer_for_every_hop(live: LiveModel, sources: dict[str, Source]) -> None:
    assert VllmEngine(sources["maths"], live)._llm.arguments["hf_overrides"] == {}
    overrides = VllmEngine(sources["maths"], live, hops=9)._llm.arguments["hf_overrides"]
    assert overrides["num_hidden_layers"] == 9


def test_layers_that_are_built_for_their_place_have_no_paths_in_vllm(sources: dict[str, Source]) -> None:
    check_paths(sources, "maths")
    turns = LayerSetting("each", ("full_attention", "sliding_attention") * 3)
    model = replace(sources["japanese"], layered={"layer_types": turns})
    with pytest.raises(InputError, match=r"engine: .*layer_types differs between layers of japanese"):
        check_paths({**sources, "japanese": model}, "maths")
    kind = replace(sources["maths"], folds={})
    with pytest.raises(InputError, match="where the layers of a llama write is not known"):
        check_paths({"maths": kind}, "maths")


def test_layers_that_share_a_buffer_are_no_path(live: LiveModel, sources: dict[str, Source]) -> None:
    assert live.stack is not None
    live.stack.lay([Step(0 if layer == 1 else layer, layer) for layer in range(6)])
    engine = VllmEngine(sources["maths"], live)
    engine.load(live)
    expected, found = both(live, engine)
    assert found == expected


def test_without_vllm(live: LiveModel, sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"engine: vllm is not installed. pip install 'evomerge\[vllm\]'"):
        VllmEngine(sources["maths"], live)


def test_a_model_that_vllm_does_not_know(live: LiveModel, sources: dict[str, Source], vllm: ModuleType) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError("no such architecture\nand more")

    vllm.__dict__["LLM"] = refuse
    with pytest.raises(InputError, match="engine: vLLM cannot serve maths: ValueError: no such architecture"):
        VllmEngine(sources["maths"], live)


def test_llvmlite_still_works_after_it_is_hidden() -> None:
    from llvmlite import binding

    from evomerge.inference.vllm_worker import hide_from_scans

    hide_from_scans()
    assert not hasattr(binding.ffi.lib, "__dict__")
    assert binding.get_process_triple()
    assert str(binding.parse_assembly("define i32 @one() { ret i32 1 }"))
