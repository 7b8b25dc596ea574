"""Chat templates: the ones known by name, and the one that most sources use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from evomerge.checkpoints.config import first_line
from evomerge.errors import InputError
from evomerge.plugins import unknown_name

_ALPACA = """\
{%- set headings = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} -%}
{%- set system = messages | selectattr('role', 'equalto', 'system') | list | last -%}
{{- system.content | trim + '\\n\\n' if system else '' -}}
{%- for message in messages if message.role in headings -%}
    {{- '### ' + headings[message.role] + ':\\n' + message.content | trim -}}
    {{- '' if loop.last else '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'assistant' -%}
    {{- '\\n\\n### Response:\\n' -}}
{%- endif -%}
"""

_CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_EXAONE = """\
{%- if messages[0].role != 'system' -%}
    {{- '[|system|][|endofturn|]\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '[|' + message.role + '|]' + message.content + ('\\n' if message.role == 'user' else '[|endofturn|]\\n') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '[|assistant|]' -}}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

_MISTRAL = """\
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' -%}
{{- bos_token -}}
{%- for message in (messages[1:] if system else messages) -%}
    {%- if message.role != ('user' if loop.index0 is even else 'assistant') -%}
        {{- raise_exception('After a system message, user and assistant must take turns, and the user begins') -}}
    {%- elif message.role == 'user' -%}
        {{- ' [INST] ' + (system if loop.first else '') + message.content + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + message.content + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}
"""The chat templates known by name."""

AUTO = "auto"


def check_template(wanted: str, place: str) -> None:
    """Reject a chat template that is neither a known name nor the text of a template.

    Raises:
        InputError: naming ``place``.
    """
    if wanted == AUTO or wanted in TEMPLATES:
        return
    if "{" not in wanted:
        raise unknown_name(wanted, [AUTO, *TEMPLATES], place, "chat template")
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(wanted)
    except TemplateError as error:
        raise InputError(place, f"is not a Jinja template: {first_line(error)}") from None


def choose_template(wanted: str, tokenizers: Iterable[Any]) -> str | None:
    """The text of a chat template.

    Args:
        wanted: a text, a name, or "auto": the template that most of the tokenizers have, the first of them on ties.
            The result is None for "auto" if none has one.
    """
    if wanted != AUTO:
        return TEMPLATES.get(wanted, wanted)
    templates = [own_template(tokenizer) for tokenizer in tokenizers]
    counts = Counter(template.strip() for template in templates if template)
    return counts.most_common(1)[0][0] if counts else None


def own_template(tokenizer: Any) -> str | None:
    """The chat template that a tokenizer came with; the default one if it has several."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
