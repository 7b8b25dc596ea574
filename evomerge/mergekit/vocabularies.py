"""Tokenizers and vocabularies in mergekit's notation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.errors import InputError
from evomerge.mergekit.references import read_reference
from evomerge.mergekit.settings import check_keys
from evomerge.recipes.stack import StackRecipe
from evomerge.vocabulary import TokenRow, TokenRule, Vocabulary, ZeroRow


def read_tokenizer(config: Mapping[str, Any], fallback: str, place: str) -> str:
    """The reference of the model that provides the tokenizer; ``fallback`` for mergekit's "base" or "union"."""
    source, where = _source(config, place)
    return fallback if source in (None, "base", "union") else read_reference(source, where)


def read_vocabulary(config: Mapping[str, Any], names: Mapping[str, str], base: str | None, place: str) -> Vocabulary:
    """The merged model's vocabulary according to a mergekit configuration.

    Args:
        names: short names of the models, by reference.
        base: reference of the base model, whose rows the others use.
    """
    source, _ = _source(config, place)
    section = config.get("tokenizer") or {}
    rules = section.get("tokens") or {}
    if not isinstance(rules, Mapping):
        raise InputError(f"{place}: tokenizer.tokens", "must be keys with values")
    step = section.get("pad_to_multiple_of")
    if step is not None and (type(step) is not int or step < 1):
        raise InputError(f"{place}: tokenizer.pad_to_multiple_of", "must be a whole number above 0")
    template = config.get("chat_template") or None
    if not isinstance(template, str | None):
        raise InputError(f"{place}: chat_template", "must be a name or the text of a template")
    if source is None:
        return Vocabulary(chat_template=template)
    return Vocabulary(
        kind="union" if source == "union" else "tokenizer",
        base=names[base] if base is not None else None,
        tokens={
            str(token): _read_rule(rule, names, f"{place}: tokenizer.tokens.{token}") for token, rule in rules.items()
        },
        pad_to_multiple_of=step,
        chat_template=template,
    )


def write_vocabulary(recipe: StackRecipe, base: str | None) -> dict[str, Any]:
    """The keys of a mergekit configuration that describe the merged model's vocabulary.

    Args:
        base: the reference of the configuration's base model.

    Raises:
        InputError: mergekit cannot express it.
    """
    vocabulary, donor = recipe.vocabulary, recipe.sources[recipe.tokenizer]
    template = {"chat_template": vocabulary.chat_template} if vocabulary.chat_template is not None else {}
    if not vocabulary.aligns:
        return ({} if donor == base else {"tokenizer_source": donor}) | template
    if vocabulary.kind == "transplant":
        problem = "makes rows of new tokens, which mergekit does with a command of its own"
        raise InputError("recipe.vocabulary.kind", problem, "`mergekit-tokensurgeon`, before the merge.")
    lender = recipe.sources[vocabulary.base] if vocabulary.base is not None else None
    if lender != base:
        problem = f"is {lender}, but mergekit takes missing rows from its base_model, which is {base}"
        raise InputError("recipe.vocabulary.base", problem)
    if vocabulary.kind == "union" and donor != base:
        raise InputError("recipe.tokenizer", f"is {donor}, but mergekit adds to the tokens of its base_model, {base}")
    source = "union" if vocabulary.kind == "union" else donor
    if not vocabulary.tokens and vocabulary.pad_to_multiple_of is None:
        return {"tokenizer_source": source} | template
    section: dict[str, Any] = {"source": source}
    if vocabulary.tokens:
        section["tokens"] = {token: _write_rule(rule, recipe) for token, rule in vocabulary.tokens.items()}
    if vocabulary.pad_to_multiple_of is not None:
        section["pad_to_multiple_of"] = vocabulary.pad_to_multiple_of
    return {"tokenizer": section} | template


def _source(config: Mapping[str, Any], place: str) -> tuple[Any, str]:
    """The tokenizer setting in the file, None if there is none, and its place."""
    if config.get("tokenizer") is None:
        return config.get("tokenizer_source"), f"{place}: tokenizer_source"
    where = f"{place}: tokenizer"
    if config.get("tokenizer_source") is not None:
        raise InputError(where, "cannot be combined with tokenizer_source", "Keep one of the two.")
    check_keys(config["tokenizer"], ("source", "tokens", "pad_to_multiple_of"), where)
    return config["tokenizer"].get("source", "union"), f"{where}.source"


def _read_rule(given: Any, names: Mapping[str, str], place: str) -> TokenRule:
    check_keys(given, ("source", "force"), place)
    force = given.get("force", False)
    if not isinstance(force, bool):
        raise InputError(f"{place}.force", "must be true or false")
    return TokenRule(source=_read_row(given.get("source"), names, f"{place}.source"), force=force)


def _read_row(given: Any, names: Mapping[str, str], place: str) -> str | ZeroRow | TokenRow:
    kind = given.get("kind") if isinstance(given, Mapping) else None
    if kind == "zero":
        check_keys(given, ("kind",), place)
        return ZeroRow(kind="zero")
    if kind != "model_token":
        return _read_model(given, names, place)
    check_keys(given, ("kind", "model", "token", "token_id"), place)
    model, token, number = _read_model(given.get("model"), names, place), given.get("token"), given.get("token_id")
    if isinstance(token, str) and number is None:
        return TokenRow(kind="model_token", model=model, token=token)
    if token is None and type(number) is int and number >= 0:
        return TokenRow(kind="model_token", model=model, token_id=number)
    raise InputError(place, "needs either `token:`, a text, or `token_id:`, a whole number")


def _read_model(given: Any, names: Mapping[str, str], place: str) -> str:
    reference = read_reference(given, place)
    if reference not in names:
        raise InputError(place, f"{reference} is not among the merged models", f"These are: {', '.join(names)}.")
    return names[reference]


def _write_rule(rule: TokenRule, recipe: StackRecipe) -> dict[str, Any]:
    source: Any
    if isinstance(rule.source, str):
        source = recipe.sources[rule.source]
    else:
        source = rule.source.model_dump(exclude_none=True)
        if isinstance(rule.source, TokenRow):
            source["model"] = recipe.sources[rule.source.model]
    return {"source": source} | ({"force": True} if rule.force else {})
