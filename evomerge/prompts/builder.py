"""The builder of prompts: the unchanged base, written once, with the prompt of a recipe before every text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from evomerge.checkpoints.prompts import key_value_heads
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.building.builders import BuildContext, BuilderBase
from evomerge.merging.building.export import write_model
from evomerge.merging.materialise import Materialiser
from evomerge.prompts.rows import common_start, prompt_rows, repeated
from evomerge.recipes.prompts import PromptsRecipe
from evomerge.recipes.stack import Blend, StackRecipe

if TYPE_CHECKING:  # these import transformers, which takes seconds and is not needed to check a recipe
    from evomerge.checkpoints.live import LiveModel
    from evomerge.prompts.soft import SoftModel
    from evomerge.prompts.tokens import PromptTokens

_MAX_SHARE = 2
"""A prompt may take up at most 1 / this of the tokens of the context, because texts need room as well."""


class PromptsBuilder(BuilderBase):
    """Builds models with soft prompts and prefixes; see ``evomerge.merging.building.builders.Builder``."""

    def __init__(self, context: BuildContext) -> None:
        self._context = context
        self._tokens: dict[int, PromptTokens] = {}

    @staticmethod
    def check(recipe: PromptsRecipe, sources: Mapping[str, Source]) -> None:
        """Reject a recipe whose prompts do not fit its base and its form, or have fewer rows than it uses."""
        base = sources[recipe.base]
        if base.prompt is not None:
            problem = f"is {recipe.base}, which has {base.prompt.facts.text}"
            raise InputError("recipe.base", problem, "Name the model alone as the base.")
        for number, run in enumerate(recipe.runs):
            for name in run.weights:
                _check_rows(name, run.first + run.rows, recipe, sources, f"recipe.runs[{number}]")
            if run.single is None and common_start(run, sources) is None:
                problem = f"mixes rows of {', '.join(run.weights)}, which did not begin as one text's embedding"
                hint = "Put them one after another; only prompts of one `prompt_tuning_init_text` mix row by row."
                raise InputError(f"recipe.runs[{number}]", problem, hint)
        context = base.config.get("max_position_embeddings")
        if isinstance(context, int) and recipe.rows * _MAX_SHARE > context:
            problem = f"has {recipe.rows} rows, and prompt and text together have room for {context} tokens"
            raise InputError("recipe.runs", problem, "Take fewer.")

    def start(self) -> None:
        """Build the base."""
        if self._context.engine is not None:
            problem = "answers only with a model's own weights, and prompts need transformers"
            raise InputError("engine", f"vllm {problem}", "Take `engine: transformers`; an exported prompt it serves.")
        _ = self._live

    def write(self, recipe: PromptsRecipe) -> LiveModel:
        """The base with a prompt; without one it is the base itself."""
        from evomerge.checkpoints.live import check_live

        self.check(recipe, self._context.sources)
        if not recipe.runs:
            live = self._soft.plain()
        elif recipe.form == "tokens":
            live = self._soft.prompted(self._stored(recipe), self._tokens_of(recipe))
        else:
            live = self._prefixed(recipe)
        check_live(live)
        return live

    def export(
        self,
        recipe: PromptsRecipe,
        out: Path,
        *,
        texts: Mapping[str, str],
        check: Callable[[Path], None] | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        """Export a soft prompt as a plain Hugging Face folder, a prefix as peft's folder, or neither as the base."""
        from evomerge.prompts.export import write_prefix, write_soft

        sources = self._context.sources
        self.check(recipe, sources)
        base, copy = sources[recipe.base], copy_of_base(recipe, sources)
        if not recipe.runs:
            write_model(copy, sources, out, texts=texts, check=check, progress=progress)
        elif recipe.form == "prefix":
            prefix = prompt_rows(recipe, sources, self._started)
            write_prefix(recipe, base, out, prefix, texts=texts, check=check)
            progress(1, 1)
        else:
            rows, tokens = self._stored(recipe), self._tokens_of(recipe)
            write_soft(copy, base, out, rows, tokens, texts=texts, check=check, progress=progress)

    def reload(self, folder: Path) -> LiveModel:
        """Load a plain folder with plain transformers, or a prefix's with peft."""
        from evomerge.prompts.export import reload_prefix, reload_soft

        if (folder / "config.json").exists():
            return reload_soft(folder, self._context.devices)
        base = self._context.sources[self._context.tokenizer]
        return reload_prefix(folder, base, self._context.devices, self._context.dtype)

    @cached_property
    def _live(self) -> LiveModel:
        """The base, with its weights."""
        from evomerge.checkpoints.live import live_model

        context = self._context
        live = live_model(context.sources[context.tokenizer], context.devices, context.dtype)
        recipe = PromptsRecipe(
            sources={context.tokenizer: context.sources[context.tokenizer].reference},
            tokenizer=context.tokenizer, base=context.tokenizer, form="tokens",
        )  # fmt: skip
        Materialiser(context.sources).write(copy_of_base(recipe, context.sources), live)
        return live

    @cached_property
    def _soft(self) -> SoftModel:
        from evomerge.prompts.soft import SoftModel

        return SoftModel(self._live, self._context.sources[self._context.tokenizer].place)

    def _tokens_of(self, recipe: PromptsRecipe) -> PromptTokens:
        """The tokenizer with one new token for each row of the prompt."""
        from evomerge.prompts.tokens import prompt_tokens

        if recipe.rows not in self._tokens:
            self._tokens[recipe.rows] = prompt_tokens(self._context.sources[recipe.tokenizer], recipe.rows)
        return self._tokens[recipe.rows]

    def _stored(self, recipe: PromptsRecipe) -> Tensor:
        """The rows of a soft prompt as stored in the embedding, [rows, width], float32."""
        return prompt_rows(recipe, self._context.sources, self._started) / self._soft.scale

    def _started(self, text: str, rows: int) -> Tensor:
        """See ``rows.Started``; uses the base's own tokenizer, with its special tokens, like peft."""
        ids = repeated(list(self._live.tokenizer(text)["input_ids"]), rows)
        return self._soft.embedded(ids)

    def _prefixed(self, recipe: PromptsRecipe) -> LiveModel:
        from evomerge.prompts.prefixed import PrefixedModel

        source, tokens = self._context.sources[recipe.base], self._tokens_of(recipe)
        heads, width = key_value_heads(source.settings)
        prefix = prompt_rows(recipe, self._context.sources, self._started)
        live = self._soft.plain()
        model = PrefixedModel(live.model, prefix.view(recipe.rows, 2 * source.layers, heads, width), tokens.first)
        return replace(live, model=model.eval(), tokenizer=tokens.tokenizer, outside={}, stack=None)


def _check_rows(name: str, rows: int, recipe: PromptsRecipe, sources: Mapping[str, Source], place: str) -> None:
    """Reject a source that lacks these rows for this base."""
    source, base = sources[name], sources[recipe.base]
    if source.prompt is None:
        raise InputError(place, f"takes rows of {name}, which has no prompt", "Name it as `MODEL+PROMPT`.")
    facts = source.prompt.facts
    if facts.form != recipe.form:
        hint = "Search over soft prompts, or over prefixes."
        raise InputError(place, f"is of {recipe.form}, and {name} is {facts.text}", hint)
    if source.folder != base.folder or base.adapters:
        problem = f"{name} is a prompt of {source.folder}, and the base {recipe.base} is {base.reference}"
        raise InputError(place, problem, "A prompt works only with the model that it was trained on.")
    if rows > facts.rows:
        raise InputError(place, f"takes {rows} rows of {name}, which has {facts.rows}")


def copy_of_base(recipe: PromptsRecipe, sources: Mapping[str, Source]) -> StackRecipe:
    """The recipe of the base alone."""
    return StackRecipe.uniform(
        Blend.copy_of(recipe.base), sources={recipe.base: recipe.sources[recipe.base]}, tokenizer=recipe.base,
        layers=sources[recipe.base].layers, seed=recipe.seed, dtype=recipe.dtype,
    )  # fmt: skip
