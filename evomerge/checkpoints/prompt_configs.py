"""The description of a soft prompt or a prefix in adapter_config.json; light, for checks before anything is opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.errors import InputError
from evomerge.printable import printable
from evomerge.recipes.prompts import PromptFacts, PromptForm

CONFIG = "adapter_config.json"

FORMS: Mapping[str, PromptForm] = {
    "PROMPT_TUNING": "tokens",
    "P_TUNING": "tokens",
    "MULTITASK_PROMPT_TUNING": "tokens",
    "PREFIX_TUNING": "prefix",
}
"""By peft's name. P_TUNING is v1, of which only the encoder's output is saved; P-tuning v2 is PREFIX_TUNING."""

_MAX_ROWS = 100_000
_AGAIN = "Save it again with peft's `save_pretrained`."


def prompt_facts(config: Mapping[str, Any], place: str) -> PromptFacts | None:
    """The facts about the prompt that an adapter's configuration describes; None for another kind of adapter.

    Raises:
        InputError: it is a prompt, but not for a causal language model, or its size is invalid.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in FORMS:
        return None
    rows = config.get("num_virtual_tokens")
    if type(rows) is not int or not 0 < rows <= _MAX_ROWS:
        wrong = printable(repr(rows), 100)
        problem = f"{CONFIG}: num_virtual_tokens is {wrong}; it must be a whole number from 1 to {_MAX_ROWS:,}"
        raise InputError(place, problem, _AGAIN)
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        task = printable(repr(config["task_type"]), 100)
        raise InputError(place, f"{CONFIG}: task_type is {task}; only prompts of causal language models can be used")
    if config.get("num_transformer_submodules") not in (None, 1):
        problem = f"{CONFIG}: num_transformer_submodules is {printable(repr(config['num_transformer_submodules']), 20)}"
        raise InputError(place, f"{problem}; a causal language model has 1")
    if kind == "MULTITASK_PROMPT_TUNING" and config.get("num_tasks") not in (None, 1):
        problem = f"{CONFIG}: num_tasks is {printable(repr(config['num_tasks']), 20)}, so it is several prompts"
        raise InputError(place, problem, "Save the prompt of one task: its row of prefix_task_cols and of ..._rows.")
    return PromptFacts(FORMS[kind], kind, rows, _start(config))


def _start(config: Mapping[str, Any]) -> str | None:
    text = config.get("prompt_tuning_init_text")
    known = config.get("peft_type") == "PROMPT_TUNING" and config.get("prompt_tuning_init") == "TEXT"
    return text if known and isinstance(text, str) and text and not config.get("tokenizer_kwargs") else None
