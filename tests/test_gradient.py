"""The gradient of the proxy by the numbers of a genome, against differences of a slow plain model in float64."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers_checkpoints import edit_tensors, save_model, tiny_config
from numpy.typing import NDArray
from test_core_space import ADAPTERS, lifted
from test_core_space import family as adapter_family
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from evomerge.checkpoints import backward, source
from evomerge.checkpoints.live import LiveModel, live_model, load_weights
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.stack import Step
from evomerge.errors import InputError
from evomerge.genome import Genome, SearchSpace
from evomerge.inference import proxy
from evomerge.inference.proxy import differentiate_proxy
from evomerge.inference.reading import Prompt
from evomerge.merging.arithmetic import definitions
from evomerge.merging.arithmetic.passes import SparsePart, Sparsify
from evomerge.merging.fitting.gradient import GenomeGradients
from evomerge.merging.materialise import Materialiser
from evomerge.merging.path import merged_tensors
from evomerge.method import find_method
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.search.settings.gradient import gradient_problem
from search_spaces.base import SpaceContext
from search_spaces.hybrid_space import HybridSpaceSettings
from search_spaces.parameter_space import ParameterSpaceSettings

pytestmark = pytest.mark.filterwarnings("ignore")

CPU = torch.device("cpu")
MIXED = ("maths", "japanese", "wide")
GENERATOR = np.random.RandomState(5)
PROMPTS = [
    Prompt("", "", GENERATOR.randint(3, 32, size=length).tolist(), scored, None, "item")
    for length, scored in ((9, 2), (14, 4), (6, 1), (14, 3))
]
IMPORTANCE = (1.0, 1.0, 2.0, 0.5)

WRITERS = ("self_attn.o_proj", "mlp.down_proj")

Vector = NDArray[np.float64]


@pytest.fixture(scope="module", autouse=True)
def _norms_in_float64(one_thread: None) -> Iterator[None]:
    with mock.patch.object(LlamaRMSNorm, "forward", _norm):  # transformers' own computes in float32
        yield


def _norm(module: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    return module.weight * hidden * (hidden.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


def family(folder: Path, config: Any) -> dict[str, Source]:
    """A model and three that are made of it by random changes of every weight."""

    def change(seed: int, tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in tensors.values():
            tensor += 0.08 * torch.randn(tensor.shape, generator=generator)

    for number, name in enumerate(("base", *MIXED)):
        save_model(config, folder / name, dtype=torch.float32)
        if number:
            edit_tensors(folder / name, partial(change, number))
    return {name: open_source(name, str(folder / name), place=name) for name in ("base", *MIXED)}


def context_of(sources: Mapping[str, Source]) -> SpaceContext:
    return SpaceContext(
        sources={name: source.reference for name, source in sources.items()},
        base="base",
        tokenizer="base",
        layers=sources["base"].layers,
        tied=sources["base"].tied,
        method=lambda name: find_method(name, "space.method"),
        recipe_seed=3,
        dtype="float32",
    )


def space_of(sources: Mapping[str, Source], **settings: Any) -> SearchSpace:
    return ParameterSpaceSettings(**settings).build(context_of(sources))


def somewhere(space: SearchSpace, seed: int = 0) -> Genome:
    """A point of the space, densities and choices as they are by default."""
    random = np.random.RandomState(seed)
    drawn = [random.uniform(p.low + 0.2 * (p.high - p.low), p.high) for p in space.parameters]
    kept = [p.default for p in space.parameters]
    return np.where([p.differentiable for p in space.parameters], drawn, kept)


def stack_at(space: SearchSpace, genome: Genome) -> StackRecipe:
    recipe = space.decode(genome)
    assert isinstance(recipe, StackRecipe)
    return recipe


# ---- the slow plain proxy --------------------------------------------------------------------------------------------


class Plain:
    """Merges by formulas in float64, with the masks of one genome, and the proxy of a plain transformers model.

    Args:
        at: the recipe whose masks and signs are kept.
    """

    def __init__(self, sources: Mapping[str, Source], at: StackRecipe) -> None:
        self._sources, self._at = sources, at
        config = AutoConfig.from_pretrained(sources["base"].folder)
        config.num_hidden_layers = len(at.hops)
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        masked = [blend for blend in at.blends if "density" in blend.parameters]
        self._alone = {name: self._taken_alone(name) for name in (masked[0].sources if masked else ())}

    def _taken_alone(self, source: str) -> dict[str, Tensor]:
        """What a source of weight one adds to the base where the others have none: its mask and rescaling."""
        return dict(Materialiser(self._sources).tensors(with_weight_of_one(self._at, source)))

    def tensors(self, recipe: StackRecipe) -> dict[str, Tensor]:
        made = {}
        for merged in merged_tensors(recipe, self._sources):
            blend, signs = (one.blend_for(merged.role, merged.name) for one in (recipe, self._at))
            own = [self._sources[name].read(merged.stored) for name in ("base", *blend.sources)]
            base, *others = own
            alone = [self._alone[name][merged.name] for name in blend.sources] if self._alone else []
            made[merged.name] = formula(blend, signs, base, others, alone)
        return made

    def scaled(self, recipe: StackRecipe) -> dict[str, Tensor]:
        """With the scales of hops in what writes to the residual stream."""
        factors = {f".{n}.{name}.weight": f for n, f in enumerate(recipe.factors) for name in WRITERS}
        return {
            name: tensor * next((f for end, f in factors.items() if name.endswith(end)), 1.0)
            for name, tensor in self.tensors(recipe).items()
        }

    def proxy(self, recipe: StackRecipe) -> float:
        with torch.no_grad():
            self._model.load_state_dict(self.scaled(recipe), strict=False)
            self._model.tie_weights()
            logs = []
            for prompt in PROMPTS:
                ids = torch.tensor([prompt.ids])
                steps = self._model(ids).logits[0].log_softmax(-1)
                logs.append(sum(float(steps[t - 1, prompt.ids[t]]) for t in range(len(prompt.ids))[-prompt.scored :]))
        return float(np.average([math.log(1 - log) for log in logs], weights=IMPORTANCE))


def with_weight_of_one(recipe: StackRecipe, source: str) -> StackRecipe:
    """A recipe whose blends take one source, as it is masked, and no other."""

    def alone(blend: Blend) -> Blend:
        weights = {name: float(name == source) for name in blend.sources}
        values = {**blend.parameters, "weight": weights, "lambda": 1.0}
        if "normalize" in values:
            values["normalize"] = False
        return blend.model_copy(update={"parameters": values, "steps": ()})

    return recipe.model_copy(update={"blends": tuple(map(alone, recipe.blends))})


def formula(blend: Blend, at: Blend, base: Tensor, sources: Sequence[Tensor], alone: Sequence[Tensor]) -> Tensor:
    """A merged tensor in float64; ``alone`` as of ``Plain``, and signs elected by the weights of ``at``."""
    b = base.double()
    own = _unscaled(blend, at, b, [x.double() for x in sources], [(x - base).double() for x in sources], base, alone)
    factor = 1.0
    for step in blend.steps:
        factor *= float(step.parameters["factor"])
    return b + factor * (own - b)


def _unscaled(
    blend: Blend, at: Blend, b: Tensor, x: Sequence[Tensor], d: Sequence[Tensor], base: Tensor, alone: Sequence[Tensor]
) -> Tensor:
    w, then = ([one.value("weight", name) for name in one.sources] for one in (blend, at))
    normalize = bool(blend.parameters.get("normalize", False))
    scale = float(blend.parameters.get("lambda", 1.0))  # type: ignore[arg-type]
    if blend.method == "linear":
        return sum(wi * xi for wi, xi in zip(w, x, strict=True)) / sum(w)  # type: ignore[return-value]
    if blend.method == "magmax":
        largest = torch.stack([wi * di for wi, di in zip(then, d, strict=True)]).abs().argmax(0)
        return b + scale * torch.stack([wi * di for wi, di in zip(w, d, strict=True)]).gather(0, largest[None])[0]
    if blend.method == "task_arithmetic":
        kept = d
    else:  # rescaled by one number a tensor, which float32 shows in the sums
        masks = [(one != base).double() for one in alone]
        kept = [
            m * di * ((one - base).double() * di.sign() * m).sum() / (m * di.abs()).sum()
            for m, di, one in zip(masks, d, alone, strict=True)
        ]
    if blend.method in ("ties", "dare_ties", "della", "breadcrumbs_ties"):
        positive = sum(wi * ki for wi, ki in zip(then, kept, strict=True)) >= 0
        agree = [((wi * ki > 0) == positive) & (ki != 0) for wi, ki in zip(then, kept, strict=True)]
        kept = [ki * agreeing for ki, agreeing in zip(kept, agree, strict=True)]
        shares = sum(wi * agreeing.double() for wi, agreeing in zip(w, agree, strict=True))
        total = sum(wi * ki for wi, ki in zip(w, kept, strict=True))
        return b + scale * (total / shares.where(shares != 0, 1.0) if normalize else total)  # type: ignore[union-attr]
    total = sum(wi * ki for wi, ki in zip(w, kept, strict=True))
    return b + scale * total / (sum(w) if normalize else 1.0)  # type: ignore[return-value]


def differences(loss: Callable[[Genome], float], genome: Genome, genes: Sequence[int], width: float = 2e-3) -> Vector:
    """Central differences of fourth order."""
    found = []
    for gene in genes:
        beside = [genome + k * width * np.eye(genome.size)[gene] for k in (-2, -1, 1, 2)]
        far, near, after, beyond = map(loss, beside)
        found.append((far - 8 * near + 8 * after - beyond) / (12 * width))
    return np.array(found)


def gradient_of(
    sources: Mapping[str, Source], space: SearchSpace, genome: Genome, live: LiveModel
) -> tuple[float, Vector]:
    """As a worker has it; a live model in float64 is given the formulas' weights, for merging rounds to float32."""
    materialiser = Materialiser(sources)
    point = GenomeGradients(materialiser, space).at(genome)
    if live.model.dtype is torch.float64:
        load_weights(live, Plain(sources, point.recipe).tensors(point.recipe).items())
    else:
        materialiser.write(point.recipe, live)
    found = differentiate_proxy(live, PROMPTS, IMPORTANCE, partial(point.listening, live))
    return found, point.gradient


CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {  # granularity, whether embeddings are tied, the space's settings
    "linear": ("block", True, {"method": "linear"}),
    "task arithmetic": ("layer", False, {"method": "task_arithmetic", "bounds": {"lambda": (0.5, 1.5)}}),
    "task arithmetic, normalised": ("model", True, {"method": "task_arithmetic", "switches": {"normalize": True}}),
    "ties": ("block", True, {"method": "ties", "bounds": {"lambda": (0.5, 1.5)}}),
    "ties, normalised": ("layer", True, {"method": "ties", "switches": {"normalize": True, "rescale": True}}),
    "dare": ("layer", True, {"method": "dare_linear"}),
    "dare, normalised": ("block", False, {"method": "dare_linear", "switches": {"normalize": True}}),
    "dare with ties": ("model", True, {"method": "dare_ties"}),
    "dare with ties, normalised": ("block", False, {"method": "dare_ties", "switches": {"normalize": True}}),
    "della": ("block", False, {"method": "della"}),
    "della without election": ("layer", True, {"method": "della_linear", "switches": {"rescale": False}}),
    "breadcrumbs": ("layer", False, {"method": "breadcrumbs"}),
    "breadcrumbs with ties": ("model", False, {"method": "breadcrumbs_ties", "switches": {"normalize": True}}),
    "magmax": ("model", True, {"method": "magmax"}),
    "a scaled change": ("layer", False, {"method": "ties", "steps": {"scale": {}}}),
    "a scaled maximum": ("layer", True, {"method": "magmax", "steps": {"scale": {}}}),
    "a profile": ("model", False, {"method": "dare_ties", "profile": "lines"}),
}
OFTEN = ("linear", "task arithmetic, normalised", "ties, normalised", "della", "a scaled maximum", "a profile")


@pytest.mark.parametrize(
    "name", [*OFTEN, *(pytest.param(n, marks=pytest.mark.nightly) for n in CASES if n not in OFTEN)]
)
def test_it_is_what_differences_of_a_plain_model_say(name: str, tmp_path: Path) -> None:
    granularity, tied, settings = CASES[name]
    sources = family(tmp_path, tiny_config(tie_word_embeddings=tied))
    space = space_of(sources, granularity=granularity, **settings)
    genome = somewhere(space)
    value, gradient = gradient_of(sources, space, genome, live_model(sources["base"], CPU, torch.float64))
    plain = Plain(sources, stack_at(space, genome))
    moving = [n for n, p in enumerate(space.parameters) if p.differentiable]
    some = sorted(np.random.RandomState(1).permutation(moving)[:6].tolist())
    wanted = differences(lambda x: plain.proxy(stack_at(space, x)), genome, some)
    assert value == pytest.approx(plain.proxy(stack_at(space, genome)), rel=1e-6)
    assert np.isnan(gradient).tolist() == [not p.differentiable for p in space.parameters]
    np.testing.assert_allclose(gradient[some], wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_hops_that_share_a_layer_have_gradients_of_their_own(tmp_path: Path) -> None:
    """A path that takes a layer twice with equal weights: in memory once, with a scale and genes for each time."""
    sources = family(tmp_path, tiny_config())
    space = HybridSpaceSettings(method="task_arithmetic", keep_ends=False).build(context_of(sources))
    path = {"slots.1.layer": 1.0, "slots.2.layer": 2.0, "slots.3.layer": 2.0, "slots.3.scale": 1.3}
    genome = np.array([path.get(p.name, p.default) for p in space.parameters])
    recipe = stack_at(space, genome)
    live = live_model(sources["base"], CPU, torch.float64)
    assert live.stack is not None
    live.stack.lay([Step(0, 0), *(Step(1, 1, factor) for factor in recipe.factors[1:])])
    assert len(set(recipe.factors)) == 2
    _, gradient = gradient_of(sources, space, genome, live)
    plain = Plain(sources, recipe)
    twice = [n for n, p in enumerate(space.parameters) if p.name in ("slots.2.weight.maths", "slots.3.weight.maths")]
    some = [
        *twice,
        *(n for n, p in enumerate(space.parameters) if p.name in ("slots.1.weight.wide", "norm.weight.wide")),
    ]
    wanted = differences(lambda x: plain.proxy(stack_at(space, x)), genome, some)
    np.testing.assert_allclose(gradient[some], wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert abs(wanted[0] - wanted[1]) > 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("method", "basis"),
    [
        ("task_arithmetic", "core"),
        ("task_arithmetic", None),
        pytest.param("dare_linear", "core", marks=pytest.mark.nightly),
    ],
)
def test_it_passes_through_adapters(method: str, basis: str | None, tmp_path: Path) -> None:
    """In core space, and of whole weights without folding an adapter."""
    sources = adapter_family(tmp_path, tiny_config(), ADAPTERS)
    space = space_of(sources, method=method, granularity="layer", basis=basis, steps={"scale": {}})
    genome = somewhere(space)
    live = live_model(sources["base"], CPU, torch.float64)

    at = stack_at(space, genome)
    alone = {name: lifted(sources, with_weight_of_one(at, name)) for name in ADAPTERS}

    def tensors(recipe: StackRecipe) -> dict[str, Tensor]:
        """Without an election the change is the sum of what each source alone makes of it."""
        made = {}
        for merged in merged_tensors(recipe, sources):
            blend = recipe.blend_for(merged.role, merged.name)
            change = sum(blend.value("weight", name) * alone[name][merged.name] for name in blend.sources)
            factor = [float(step.parameters["factor"]) for step in blend.steps] or [1.0]
            made[merged.name] = sources["base"].read(merged.stored).double() + factor[0] * change
        return made

    materialiser = Materialiser(sources)
    point = GenomeGradients(materialiser, space).at(genome)
    load_weights(live, tensors(point.recipe).items())
    with mock.patch.object(source, "fold", side_effect=AssertionError("folded")):
        differentiate_proxy(live, PROMPTS, IMPORTANCE, partial(point.listening, live))
    plain = Plain(sources, at)
    plain.tensors = tensors  # type: ignore[method-assign]
    places = ("layers.1", "embedding")
    some = [n for n, p in enumerate(space.parameters) if p.differentiable and p.name.startswith(places)]
    wanted = differences(lambda x: plain.proxy(stack_at(space, x)), genome, some)
    np.testing.assert_allclose(point.gradient[some], wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


# ---- memory, and what is left behind ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return family(tmp_path_factory.mktemp("tied"), tiny_config(tie_word_embeddings=True))


@pytest.mark.parametrize("elect", [True, False])
@pytest.mark.parametrize("size", [1, 1000, 2049])
def test_compiled_derivatives_of_a_sparse_pass_are_those_of_its_definition(elect: bool, size: int) -> None:
    random = torch.Generator().manual_seed(size)
    base, gradient = torch.randn(size, generator=random), torch.randn(size, generator=random)
    sources = [base + 0.05 * torch.randn(size, generator=random) for _ in range(4)]
    sources[3] = base.clone()  # a task vector of zeros, of whose elements none agrees
    windows = [(0.0, math.inf), (0.03, math.inf), (0.02, 0.08), (0.0, math.inf)]
    weights = (0.7, -0.4, 1.1, 0.5)
    parts = [SparsePart(f"source {k}", weights[k], *windows[k]) for k in range(4)]
    made = Sparsify("base", tuple(parts), elect=elect)
    constants = made._constants(0, base.device)
    expected = definitions.sparsify_derivatives(gradient, [base, *sources], *constants)
    found = made.derivatives([base, *sources], 0, gradient)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_no_more_than_one_tensor_has_a_gradient_at_a_time(tied: dict[str, Source]) -> None:
    space = space_of(tied, method="ties", granularity="layer")
    live = live_model(tied["base"], CPU, torch.float32)
    handed: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    hand_over = backward._hand_over

    def watch(views: Any, parameter: Tensor) -> None:
        handed.append(weakref.ref(parameter.grad))  # type: ignore[arg-type]
        alive.append(sum(one() is not None for one in handed))
        hand_over(views, parameter)

    with mock.patch.object(backward, "_hand_over", watch):
        gradient_of(tied, space, somewhere(space), live)
    assert alive == [1] * len(live.tensors)
    assert not any(one() is not None for one in handed)


def test_the_model_is_left_as_it_was(tied: dict[str, Source]) -> None:
    space = space_of(tied, method="dare_ties", granularity="layer")
    live, materialiser = live_model(tied["base"], CPU, torch.float32), Materialiser(tied)
    first, second = (stack_at(space, somewhere(space, seed)) for seed in (1, 2))

    def answers() -> list[Tensor]:
        found = []
        for recipe in (first, second):
            materialiser.write(recipe, live)
            with torch.inference_mode():
                found.append(live.model(torch.arange(3, 20)[None]).logits)
        return found

    before, held = answers(), {name: id(tensor) for name, tensor in live.model.named_parameters()}
    point = GenomeGradients(materialiser, space).at(somewhere(space, 3))
    materialiser.write(point.recipe, live)
    with mock.patch.object(proxy, "SHARE_OF_FREE", 0.0):
        differentiate_proxy(live, PROMPTS, IMPORTANCE, partial(point.listening, live))
    assert all(torch.equal(one, other) for one, other in zip(before, answers(), strict=True))
    assert {name: id(tensor) for name, tensor in live.model.named_parameters()} == held
    assert not any(p.requires_grad or p.grad is not None for p in live.model.parameters())
    assert not any("forward" in vars(module) for module in live.model.modules())


def test_layers_are_computed_again_where_memory_is_short_and_batches_do_not_show(tied: dict[str, Source]) -> None:
    space = space_of(tied, method="task_arithmetic", granularity="layer")
    live = live_model(tied["base"], CPU, torch.float64)
    passes: list[int] = []
    layer = type(live.model.model.layers[0].mlp)
    forward = layer.forward

    def count(module: Any, *given: Any) -> Any:
        passes.append(1)
        return forward(module, *given)

    def found(**limits: float) -> Vector:
        passes.clear()
        with mock.patch.multiple(proxy, **limits), mock.patch.object(layer, "forward", count):  # type: ignore[arg-type]
            return gradient_of(tied, space, somewhere(space), live)[1]

    whole = found(MAX_TOKENS=2048)
    assert len(passes) == 2
    np.testing.assert_allclose(found(SHARE_OF_FREE=0.0), whole, rtol=1e-9)
    assert len(passes) == 4
    np.testing.assert_allclose(found(MAX_TOKENS=1), whole, rtol=1e-5)
    assert len(passes) == 2 * len(PROMPTS)
    np.testing.assert_allclose(found(_LOGITS_BYTES=1), whole, rtol=1e-5)


# ---- where there is none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"method": "ties"}, None),
        ({"method": ["ties", "dare_linear"], "profile": "tiers"}, None),
        ({"method": "tsv"}, "tsv makes weights by more than sums"),
        ({"method": ["ties", "nuslerp"]}, "nuslerp makes weights by more than sums"),
        ({"method": "ties", "steps": {"iso": {}}}, "the step iso does more than to multiply changes"),
        ({"method": "ties", "fixed": {"weight": 1.0}}, "are not a differentiable function of any of its parameters"),
        ({"method": "ties", "fixed": {"weight": 1.0}, "steps": {"scale": {}}}, None),
    ],
)
def test_what_has_no_gradient_says_so_by_its_name(
    tied: dict[str, Source], settings: dict[str, Any], problem: str | None
) -> None:
    found = gradient_problem(space_of({name: tied[name] for name in ("base", "maths", "japanese")}, **settings))
    assert (found is None) == (problem is None)
    assert (problem or "") in (found or "")


def test_a_genome_without_a_gradient_is_refused_before_anything_runs(tied: dict[str, Source]) -> None:
    space = space_of(tied, method=["ties", "tsv"])
    genome = np.array([p.high if p.name.endswith("method") else p.default for p in space.parameters])
    with pytest.raises(InputError, match="has no gradient: tsv"):
        GenomeGradients(Materialiser(tied), space).at(genome)
