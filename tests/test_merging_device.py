"""Passes as a GPU runs them, here on the CPU: the same values, whatever is compiled and wherever the sources lie."""

from __future__ import annotations

import re

import pytest
import torch
from helpers_checkpoints import save_model, tiny_config

from evomerge.checkpoints.live import live_model
from evomerge.checkpoints.source import Source, open_source
from evomerge.merging.arithmetic import device
from evomerge.merging.arithmetic.device import DeviceRunner, Residency, choose_residency
from evomerge.merging.materialise import Materialiser
from evomerge.merging.path import merged_tensors
from evomerge.method import default_parameters, own_methods
from evomerge.recipes.stack import Blend, StackRecipe

METHODS = {name: method for name, method in own_methods().items() if not method.needs}
GB = 10**9
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("sources", "device_free", "host_free", "place", "reason"),
    [
        (40, 70, 200, "device", r"the sources \(40.0 GB\) fit beside the model \(50.0 GB to spare\)"),
        (60, 70, 200, "pinned", r"do not fit .* \(50.0 GB to spare\); host memory takes them \(200.0 GB free\)"),
        (60, 10, 100, "mapped", r"do not fit .* \(0.0 GB to spare\), nor into half .* \(100.0 GB\)"),
    ],
)
def test_sources_are_kept_where_they_fit(
    sources: int, device_free: int, host_free: int, place: str, reason: str
) -> None:
    found = choose_residency(sources * GB, device_free * GB, 80 * GB, host_free * GB)
    assert found.residency == place
    assert re.search(reason, found.reason)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    root = tmp_path_factory.mktemp("models")
    names = ("base", "a", "b")
    return {
        name: open_source(name, str(save_model(tiny_config(), root / name, seed=i)), place=name)
        for i, name in enumerate(names)
    }


def recipe(method: str, sources: dict[str, Source]) -> StackRecipe:
    spec = METHODS[method]
    mixed = ("a", "b")[: spec.max_sources]
    blend = Blend(
        method=method,
        sources=mixed,
        base="base" if spec.needs_base else None,
        parameters=default_parameters(spec, mixed),
    )
    return StackRecipe.uniform(
        blend, sources={name: s.reference for name, s in sources.items()}, tokenizer="base", layers=2, seed=4
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_device_makes_what_the_compiled_passes_make(
    method: str, sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = dict(Materialiser(sources).tensors(recipe(method, sources)))
    live = live_model(sources["base"], CPU)
    materialiser = Materialiser(sources)
    monkeypatch.setattr(device, "_PIECE", 1 << 10)
    materialiser._stack(live)
    monkeypatch.setattr(materialiser, "_runner", materialiser._on(CPU))
    materialiser.write(recipe(method, sources), live)
    for name, tensor in live.tensors.items():
        # Sums are fused in the compiled passes and are not here, which can turn the last digit when rounded.
        assert torch.allclose(tensor, expected[name], rtol=2**-7, atol=1e-6), name
        assert (tensor == expected[name]).float().mean() > 0.95, name


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "della", "sce", "ram"])
def test_what_a_device_exports_is_what_it_makes_live(
    method: str, sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in whatever order the device adds up: export must not go back to the CPU's compiled passes."""
    materialiser, live = Materialiser(sources), live_model(sources["base"], CPU)
    materialiser._stack(live)
    monkeypatch.setattr(materialiser, "_runner", materialiser._on(CPU))
    monkeypatch.setattr(materialiser, "_exporter", DeviceRunner(CPU, materialiser.read, [], "mapped"))
    # A device whose arithmetic is another.
    monkeypatch.setattr(device, "call", lambda function, *arguments: 1.5 * function(*arguments))
    materialiser.write(recipe(method, sources), live)
    exported = dict(materialiser.tensors(recipe(method, sources)))
    assert all(torch.equal(tensor, exported[name]) for name, tensor in live.tensors.items())
    ours = dict(Materialiser(sources).tensors(recipe(method, sources)))
    differs = not all(torch.equal(tensor, ours[name]) for name, tensor in exported.items())
    assert differs or method == "ram"  # whose rows are plain torch everywhere


@pytest.mark.parametrize("residency", ["device", "mapped"])
def test_where_the_sources_lie_changes_nothing(residency: Residency, sources: dict[str, Source]) -> None:
    materialiser = Materialiser(sources)
    runner = DeviceRunner(CPU, materialiser.read, [], residency)
    for _ in range(2):
        assert torch.equal(runner.tensor(("a", "lm_head.weight")), sources["a"].read("lm_head.weight"))
    assert runner.choice.reason == "asked for"


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "della", "sce", "cabs"])
def test_the_definitions_compile_without_a_break(
    method: str, sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced by torch.compile as on CUDA, with whole graphs demanded, and run without generating code."""
    torch._dynamo.reset()
    device.compiled.cache_clear()
    compile_ = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, dynamic, options: compile_(function, dynamic=dynamic, fullgraph=True, backend="aot_eager"),
    )
    monkeypatch.setattr(device, "is_compiled", lambda device: True)
    materialiser = Materialiser(sources)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = dict(materialiser.tensors(recipe(method, sources)))[name]
    (merged,) = (m for m in merged_tensors(recipe(method, sources), sources) if m.name == name)
    out = torch.empty_like(expected)
    plan, refs = materialiser.planned(merged, recipe(method, sources))
    DeviceRunner(CPU, materialiser.read, [], "mapped").run(plan, refs, out)
    device.compiled.cache_clear()
    assert torch.allclose(out, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("residency", ["device", "pinned", "mapped"])
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_makes_what_the_cpu_makes(method: str, residency: Residency, sources: dict[str, Source]) -> None:
    expected = dict(Materialiser(sources).tensors(recipe(method, sources)))
    live = live_model(sources["base"], torch.device("cuda"))
    Materialiser(sources, residency=residency).write(recipe(method, sources), live)
    for name, tensor in live.tensors.items():
        assert torch.allclose(tensor.cpu(), expected[name], rtol=2**-7, atol=1e-6), name
