"""A kind of recipe, its builder and its search space: two models whose logits are averaged.

p(token) is softmax(s a(token) + (1 - s) b(token)) for the logits a and b of the two models: the normalised geometric
mean of their predictions, as in "product of experts" decoding (Liu et al., "DExperts", arXiv 2105.03023, equation 1,
without the base). Both models run for every token, so it costs as much as both together, which merging should improve
on.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from evomerge.checkpoints.live import LiveModel, check_live, for_scoring, live_model
from evomerge.checkpoints.plain import plain_model
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.target import check_target
from evomerge.errors import InputError
from evomerge.genome import Baseline, Genome, Parameter
from evomerge.merging.building.builders import BuildContext, BuilderBase
from evomerge.merging.building.export import write_model
from evomerge.merging.materialise import Materialiser
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import Blend, StackRecipe
from search_spaces.base import SpaceContext, SpaceSettings

_ABOUT = "averaged.json"


class AveragedLogits(Recipe):
    """``share`` is the share of ``first``; ``second`` has the rest."""

    kind: ClassVar[str] = "averaged_logits"

    first: str
    second: str
    share: float = Field(ge=0, le=1)

    def used_sources(self) -> set[str]:
        return {self.first, self.second}

    def lines(self) -> list[str]:
        return [f"logits of {self.first} times {self.share:.4g} and of {self.second} times {1 - self.share:.4g}"]


class AveragedModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Two causal language models with one vocabulary as one. Its cache has the first's layers, then the second's."""

    _supports_sdpa = True  # both sides have their own attention

    def __init__(self, first: PreTrainedModel, second: PreTrainedModel, share: float) -> None:
        super().__init__(copy.deepcopy(first.config))
        self.generation_config = copy.deepcopy(first.generation_config)
        self.models = torch.nn.ModuleList([first, second])
        self.share = share

    def get_input_embeddings(self) -> torch.nn.Module:
        embeddings: torch.nn.Module = self.models[0].get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> torch.nn.Module:
        head: torch.nn.Module = self.models[0].get_output_embeddings()
        return head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast:
        """See ``LlamaForCausalLM.forward``."""
        said = {"attention_mask": attention_mask, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
        logits, layers, begin = [], [], 0
        for model in self.models:
            count = model.config.num_hidden_layers
            cache = None if past_key_values is None else _part(past_key_values, begin, begin + count)
            out = model(input_ids, past_key_values=cache, use_cache=use_cache, **said)
            logits.append(out.logits.float())
            layers += out.past_key_values.layers if use_cache else []
            begin += count
        if use_cache and not getattr(past_key_values, "layers", None):
            past_key_values = DynamicCache() if past_key_values is None else past_key_values
            past_key_values.layers = layers
        mean = torch.lerp(logits[1], logits[0], self.share)
        return CausalLMOutputWithPast(logits=mean, past_key_values=past_key_values)


def _part(cache: Any, begin: int, end: int) -> Any:
    """Some layers of a cache, which stay its own, as a cache."""
    part = copy.copy(cache)
    part.layers = cache.layers[begin:end]
    return part


class AveragedLogitsBuilder(BuilderBase):
    """Builds both models of a recipe, each unchanged; see ``evomerge.merging.building.builders.Builder``."""

    def __init__(self, context: BuildContext) -> None:
        self._context = context
        self._sides: dict[str, LiveModel] = {}

    @staticmethod
    def check(recipe: AveragedLogits, sources: Mapping[str, Source]) -> None:
        first, second = (sources[name].config.get("vocab_size") for name in (recipe.first, recipe.second))
        if first != second:
            raise InputError("recipe.second", f"knows {second} tokens and {recipe.first} knows {first}")

    def start(self) -> None:
        """Do nothing: the first recipe determines which two models are needed."""

    def write(self, recipe: AveragedLogits) -> LiveModel:
        sides = [self._side(name, recipe) for name in (recipe.first, recipe.second)]
        live = _live(sides[0], sides[1], recipe.share)
        check_live(live)
        return live

    def _side(self, name: str, recipe: AveragedLogits) -> LiveModel:
        if name not in self._sides:
            source = self._context.sources[name]
            live = live_model(source, self._context.devices, self._context.dtype)
            Materialiser(self._context.sources).write(_copy_of(name, source.layers, recipe), live)
            self._sides[name] = live
        return self._sides[name]

    def export(
        self,
        recipe: AveragedLogits,
        out: Path,
        *,
        texts: Mapping[str, str],
        check: Callable[[Path], None] | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        """A folder with a plain one for each model, and how they are averaged."""
        check_target(out)
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            for name in (recipe.first, recipe.second):
                alone = _copy_of(name, self._context.sources[name].layers, recipe)
                write_model(alone, self._context.sources, made / name, texts={}, progress=progress)
            about = {"first": recipe.first, "second": recipe.second, "share": recipe.share}
            for file, text in {**texts, _ABOUT: json.dumps(about, indent=2) + "\n"}.items():
                (made / file).write_text(text, encoding="utf-8")
            if check is not None:
                check(made)
            made.rename(out)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def reload(self, folder: Path) -> LiveModel:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        sources = [open_source(about[key], str(folder / about[key]), place=str(folder)) for key in ("first", "second")]
        first, second = (plain_model(source, self._context.devices, None) for source in sources)
        return _live(first, second, about["share"])


def _live(first: LiveModel, second: LiveModel, share: float) -> LiveModel:
    return LiveModel(for_scoring(AveragedModel(first.model, second.model, share)), first.tokenizer)


def _copy_of(name: str, layers: int, like: Recipe) -> StackRecipe:
    """The recipe of one unchanged source."""
    blend = Blend(method="passthrough", sources=(name,), parameters={"scale": {name: 1.0}})
    return StackRecipe.uniform(
        blend, sources=like.sources, tokenizer=like.tokenizer, layers=layers, seed=like.seed, dtype=like.dtype
    )


class AveragedLogitsSettings(SpaceSettings):
    """``space: {kind: averaged_logits}``: one number, the first source's share."""

    kind: Literal["averaged_logits"]

    def build(self, context: SpaceContext) -> AveragedLogitsSpace:
        if len(context.mixed) != 2:
            raise InputError("space", f"averages the logits of two sources, and there are {len(context.mixed)}")
        return AveragedLogitsSpace(context)


class AveragedLogitsSpace:
    """See ``evomerge.genome.SearchSpace``."""

    parameters = (Parameter("share", 0.0, 1.0, 0.5),)

    def __init__(self, context: SpaceContext) -> None:
        self._context = context
        self.layer_buffers = self.hops = context.layers

    def decode(self, genome: Genome) -> AveragedLogits:
        first, second = self._context.mixed
        return AveragedLogits(
            sources=dict(self._context.sources),
            tokenizer=self._context.tokenizer,
            seed=self._context.recipe_seed,
            dtype=self._context.dtype,
            first=first,
            second=second,
            share=float(genome[0]),
        )

    def genome_of(self, recipe: Recipe) -> Genome | None:
        return np.array([recipe.share]) if isinstance(recipe, AveragedLogits) else None

    def baselines(self) -> Iterator[Baseline]:
        middle = np.array([0.5])
        for name in self._context.sources:
            yield Baseline(name, "source", _copy_of(name, self._context.depth(name), self.decode(middle)), None)
        yield Baseline("equal shares", "average", self.decode(middle), middle)
