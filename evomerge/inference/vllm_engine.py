"""vLLM in place of transformers for generated answers: one engine per worker, its weights replaced in place.

Written against vLLM 0.32. Everything that depends on vLLM's internals is in this file: the weights go through its own
``reload_weights`` (which repacks them if its kernels need another layout), what that leaves undone is fixed, and the
prefix cache, which is keyed by prompts and not by weights, is cleared.

Its model has as many layers as the longest path of the search. For a shorter path, the remaining layers write zero to
the residual stream, and so change nothing. One engine thus serves paths of every length; another engine for every
length would take longer to start than dozens of candidates take to score.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from evomerge.checkpoints.config import first_line
from evomerge.checkpoints.layered import written_settings
from evomerge.checkpoints.live import LiveModel
from evomerge.checkpoints.parts import fold_in
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.stack import Stack, Step
from evomerge.checkpoints.tokenizer_files import tokenizer_folder
from evomerge.errors import InputError
from evomerge.inference.generation import text_of
from evomerge.inference.requests import Batch, Generate, Likelihood, Response, Text, refuse_media, refuse_shaping
from evomerge.inference.transformers_engine import TransformersEngine
from evomerge.inference.vllm_worker import SharedWeights, hide_from_scans, places_of, repack_head
from evomerge.recipes.stack import renumber

ENVIRONMENT = {
    # Run the engine in this process, so that it can be given the live model's own tensors instead of copies.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",  # it logs to the screen of the search, and warns about every reload
    "VLLM_NO_USAGE_STATS": "1",
    # How workers are started, if there are several: a fork of a process with threads may hang.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
"""Variables that vLLM reads when it is imported; values set by the user take precedence, except over the first."""

_GPU_SHARE = 0.5  # of what the live model leaves free: the other half is for cached sources and merging
_HOST_CACHE = 1 << 30  # KV cache on a CPU, which is allocated immediately; VLLM_CPU_KVCACHE_SPACE overrides it
_PROBES, _PROBE_TOKENS = 32, 8
# Rounding decides between equally likely tokens, which are rare; with different weights hardly any probe agrees.
_AGREEING = 0.75


def import_vllm() -> Any:
    """The module ``vllm``, configured for an engine in this process.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        return importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise InputError("engine", f"vllm cannot be imported: {first_line(error)}") from error
        hint = "pip install 'evomerge[vllm]', or leave `engine` out."
        raise InputError("engine", "vllm is not installed", hint) from None


class VllmEngine:
    """An ``Engine`` that answers with vLLM. Likelihoods are computed by the live model, with transformers.

    If the live model's layers are spread over several devices, these also divide the engine's model by tensor
    parallelism (see ``vllm_worker``). Memory, in addition to the live model's: on a GPU half of what is free when the
    engine starts, for its weights, activations and KV cache; on a CPU its weights and 1 GiB of KV cache.

    Args:
        source: provides configuration and tokenizer.
        live: the live model that will be loaded: the engine shares its dtype, devices and context.
        hops: the length of the longest path that will be loaded; None for the number of layers of the source.

    Raises:
        InputError: vLLM is not installed, or cannot serve this model here.
    """

    greedy_only = True

    def __init__(self, source: Source, live: LiveModel, hops: int | None = None) -> None:
        self._vllm = import_vllm()
        self._source, self._hops = source, hops or source.layers
        self._tokenizer, self._devices = live.tokenizer, live.devices or (live.device,)
        ends = live.model.generation_config.eos_token_id
        self._ends = [ends] if isinstance(ends, int) else list(ends or ())
        self._compared = False
        self._transformers = TransformersEngine(live)
        hide_from_scans()
        try:
            with tokenizer_folder(source) as folder:
                self._llm = self._vllm.LLM(
                    model=str(folder),
                    hf_overrides=_of_depth(source, self._hops),
                    load_format="dummy",
                    dtype=str(live.model.dtype).removeprefix("torch."),
                    max_model_len=getattr(live.model.config, "max_position_embeddings", None),
                    generation_config="vllm",  # do not read the model's: `_settings` sets everything
                    enable_prefix_caching=True,
                    **_layout(self._devices),
                    **_memory(self._devices),
                )
        except Exception as error:  # an unsupported model may raise anything inside vLLM
            problem = f"vLLM cannot serve {source.name}: {first_line(error)}"
            raise InputError("engine", problem, "Leave `engine` out.") from error

    @torch.inference_mode()
    def load(self, live: LiveModel) -> None:
        """Write the live model's weights into the engine's, in place, and clear the prefix cache.

        The first time, the most likely tokens after some probes are compared, so that a model that vLLM computes
        differently, or whose weights it does not load, is rejected instead of scored.

        Raises:
            InputError: the tokens differ.
            RuntimeError: the prefix cache cannot be cleared.
        """
        self._transformers = TransformersEngine(live)
        self._hand_over(live)
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache, whose answers are another candidate's")
        if not self._compared:
            self._compare(live)
            self._compared = True

    def respond(self, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Response]]]:
        """See ``Engine``. Requests of all objectives go into one call, because vLLM forms its own batches."""
        refuse_media(batches, "the engine vllm gives models")
        refuse_shaping(batches, "vllm")
        likelihoods = [[r for r in batch.requests if isinstance(r, Likelihood)] for batch in batches]
        scored = dict(self._transformers.respond([Batch(requests) for requests in likelihoods]))
        texts = iter(self._answers([r for batch in batches for r in batch.requests if isinstance(r, Generate)]))
        for number, batch in enumerate(batches):
            logs = iter(scored[number])
            yield number, [next(texts) if isinstance(r, Generate) else next(logs) for r in batch.requests]

    def _hand_over(self, live: LiveModel) -> None:
        """Let vLLM's loader take every tensor, in this process or in those of its workers."""
        if len(self._devices) == 1:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights(live)})
            self._llm.apply_model(repack_head)
            return
        weights = list(self._weights(live))  # keeps temporary tensors alive until they are loaded
        for device in {device for device in self._devices if device.type != "cpu"}:
            torch.accelerator.synchronize(device)
        self._llm.collective_rpc("take_weights", args=(places_of(weights, len(self._devices)),))

    def _weights(self, live: LiveModel) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the engine's model by name: scales are folded in, and surplus layers write zero."""
        if live.stack is None or (self._hops == live.stack.depth and _is_plain(live.stack)):
            yield from live.tensors.items()
            return
        yield from live.outside.items()
        path = live.stack.path
        for number in range(self._hops):
            step, factor = (path[number], path[number].factor) if number < len(path) else (path[0], 0.0)
            yield from _scaled(self._source, live.stack, number, step, factor)

    def _answers(self, requests: Sequence[Generate]) -> list[Text]:
        """The greedy answer to each prompt, in order, up to the first of its stop strings."""
        if not requests:
            return []
        asked = [self._vllm.TokensPrompt(prompt_token_ids=list(request.prompt.fed)) for request in requests]
        outputs = self._llm.generate(asked, [self._settings(request) for request in requests], use_tqdm=False)
        # Decoded here and not by vLLM, which keeps a leading space that decoding an answer on its own omits.
        return [
            Text(text_of(self._tokenizer, list(output.outputs[0].token_ids), request.stop))
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _settings(self, request: Generate) -> Any:
        return self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=request.max_new_tokens,
            stop=list(request.stop),
            skip_special_tokens=False,  # a special token may be a stop string, as in transformers
            # Exactly the end tokens of transformers: vLLM would add the tokenizer's own.
            ignore_eos=True,
            stop_token_ids=self._ends,
        )

    def _compare(self, live: LiveModel) -> None:
        """Reject an engine whose continuations of probes differ from the live model's."""
        count = _PROBES * _PROBE_TOKENS
        probes = torch.arange(count, device=live.device) % live.model.config.get_text_config().vocab_size
        probes = probes.view(_PROBES, _PROBE_TOKENS)
        expected = live.model(probes, use_cache=False).logits[:, -1].argmax(-1).tolist()
        settings = self._vllm.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
        asked = [self._vllm.TokensPrompt(prompt_token_ids=ids) for ids in probes.tolist()]
        actual = [output.outputs[0].token_ids[0] for output in self._llm.generate(asked, settings, use_tqdm=False)]
        same = sum(a == b for a, b in zip(expected, actual, strict=True))
        if same < _AGREEING * _PROBES:
            problem = f"vLLM goes on from {same} of {_PROBES} probes as transformers does, so it computes another model"
            raise InputError("engine", problem, "Leave `engine` out.")


def _layout(devices: Sequence[torch.device]) -> dict[str, Any]:
    """How the engine divides its model: one process for each of several devices, all on this node."""
    if len(devices) == 1:
        return {}
    return {
        "tensor_parallel_size": len(devices),
        "distributed_executor_backend": "mp",  # even in a Ray worker, since these GPUs belong to it
        "worker_extension_cls": f"{SharedWeights.__module__}.{SharedWeights.__name__}",
    }


def _memory(devices: Sequence[torch.device]) -> dict[str, Any]:
    """The engine's memory settings for each device: as much as the fullest one can provide. On a CPU also no
    compilation, which would retain the weights that it was compiled for."""
    if devices[0].type == "cpu":
        return {"kv_cache_memory_bytes": _HOST_CACHE, "enforce_eager": True}
    shares = [free / total for free, total in map(torch.cuda.mem_get_info, devices)]
    return {"gpu_memory_utilization": _GPU_SHARE * min(shares)}


def check_paths(sources: Mapping[str, Source], tokenizer: str) -> None:
    """Reject models whose layers cannot form a path in vLLM, which builds every layer for its position.

    Raises:
        InputError: naming what differs from layer to layer, or that it is unknown where layers write.
    """
    model = sources[tokenizer]
    hint = "Leave `engine` out: transformers can."
    for name, source in sources.items():
        for key, setting in source.layered.items():
            first = model.layered[key].values[0] if key in model.layered else setting.values[0]
            if any(value != first for value in setting.values):
                problem = f"vLLM builds every layer for its place, and {key} differs between layers of {name}"
                raise InputError("engine", f"{problem}: it cannot serve paths of these", hint)
    if not model.folds:
        kind = model.config["model_type"]
        problem = f"where the layers of a {kind} write is not known, so that vLLM cannot serve paths of several lengths"
        raise InputError("engine", problem, hint)


def _of_depth(source: Source, hops: int) -> dict[str, Any]:
    """The configuration changes for a model with this many layers, all like the first."""
    if hops == source.layers:
        return {}
    first = {key: setting.values[0] for key, setting in source.layered.items()}
    return {source.settings["depth"]: hops, **written_settings(source.layered, [first] * hops)}


def _is_plain(stack: Stack) -> bool:
    """Whether the layers are those of the configuration, each once, in order and unscaled."""
    return [(step.like, step.factor) for step in stack.path] == [(layer, 1.0) for layer in range(stack.depth)]


def _scaled(source: Source, stack: Stack, number: int, step: Step, factor: float) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a layer as layer ``number``, adding ``factor`` times its output to the residual stream."""
    roles = source.roles
    folds = {renumber(n, roles[n], number): fold for n, fold in source.folds.items() if roles[n].layer == step.like}
    for name, tensor in stack.tensors_of(number, step):
        if factor != 1.0 and name in folds:
            tensor = tensor.clone()
            fold_in(tensor, factor, folds[name])
        yield name, tensor
