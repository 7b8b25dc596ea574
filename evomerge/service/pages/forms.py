"""The fields of the form for a new search: the keys of the search file that people set most.

For sections of the search file, and for parts of other packages, fields are generated from the JSON schema, so that
everything that is added or installed can be filled in; the labels and hints of sections are written here. The fields of
this project's spaces and evaluators are written by hand; tests compare them with the classes that read them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.errors import PydanticUserError

from evaluators.base import EvaluatorSettings
from evomerge.errors import InputError
from evomerge.method import AUTO
from evomerge.optimizers.base import Settings
from evomerge.plugins import OWN, find_class, plugins
from evomerge.search.settings.search_file import SearchFile
from search_spaces.base import SpaceSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Field:
    """A key of the search file as a form field: a list of ``options``, a text with ``suggestions``, or a switch.

    ``labels`` are shown instead of the options. "pairs" are names with a text each, written ``a=..., b=...``.
    """

    key: str
    label: str
    kind: Literal["text", "number", "numbers", "pairs", "switch"] = "text"
    default: str | bool = ""
    hint: str = ""
    example: str = ""
    required: bool = False
    options: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """An evaluator or a space: its name in the search file, its display name, a description, and its fields."""

    name: str
    label: str
    hint: str
    fields: tuple[Field, ...]


_METHOD = Field(
    "method",
    "Method",
    default=AUTO,
    options=(AUTO, *plugins("evomerge.merge_methods")),
    hint="auto: the one that measurements recommend",
)

_ENCODING = Field("encoding", "Encoding", options=("blocks", "indicators", "integers", "pruning"), default="blocks")
_MAX_HOPS = Field("max_hops", "Longest path", "number", hint="in layers; twice the layers of a source unless given")
_SCALING = Field(
    "scaling",
    "Scaling",
    options=("", "stream", "update"),
    hint="what a layer's scale multiplies: the residual stream, or its update",
)

_OWN_SPACES = (
    Group(
        "parameter_space", "Weights", "how much of each source goes into each layer",
        (
            _METHOD,
            Field("granularity", "Granularity", options=("model", "layer", "block", "adaptive"), default="model",
                  hint="what has numbers of its own; by hand also a number of layers"),
            Field("finest", "Adaptive, down to", options=("", "layer", "block"),
                  labels=("", "layers", "attention and mlp of each layer"), hint="where the granularity is adaptive"),
            Field("profile", "Over depth", options=("", "lines", "tiers"),
                  labels=("alike", "two numbers from first to last", "three tiers of layers"),
                  hint="a few numbers that scale the change of layers, where the granularity is model"),
            Field("profile.cosines", "Curves over depth", "number", example="3",
                  hint="in place of that, so many numbers for a smooth curve of each weight"),
            Field("basis", "Adapters in core space", options=("", "core"), labels=("no", "yes"),
                  hint="for LoRA adapters of one base: their changes in the few coordinates that hold them"),
        ),
    ),
    Group(
        "data_flow_space", "Paths", "which layers of which source a token passes through",
        (
            _ENCODING,
            Field("segments", "Segments", "number", example="4", hint="of blocks: runs of layers"),
            _MAX_HOPS,
            _SCALING,
        ),
    ),
    Group(
        "hybrid_space", "Both at once", "a path through layers that are merges themselves",
        (
            _METHOD,
            Field("granularity", "Weights for", default="model", options=("model", "hop"),
                  labels=("the whole model", "each layer on the path")),
            Field("encoding", "Encoding", options=("pruning", "integers", "blocks", "indicators"), default="pruning"),
            _MAX_HOPS,
            _SCALING,
        ),
    ),
    Group(
        "routed", "Routed adapters", "which adapters each token passes through, layer by layer",
        (
            Field("router", "Routers", options=("fitted", "prototypes", "spectral", "arrow"), default="fitted",
                  labels=("fitted to right answers", "prototypes of texts", "spectral, by texts", "Arrow"),
                  hint="fitted needs right answers, below; prototypes and spectral texts of each source's own"),
            Field("granularity", "Numbers for", options=("group", "model"), default="group",
                  labels=("each group of layers", "the whole model")),
            Field("groups", "Groups of layers", "number", example="4"),
            Field("like", "As in", options=("", "mov", "molora", "loramoe", "mola"),
                  labels=("no paper", "MoV", "MoLORA", "LoRAMoE", "MoLA"), hint="settles all that the paper does"),
            Field("base_expert", "Base as an expert", "switch", hint="tokens may pass by all adapters"),
        ),
    ),
    Group(
        "mixture", "Mixture of experts", "dense fine-tunes as experts of a plain mixture, which engines load",
        (
            Field("architecture", "Architecture", options=("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe"),
                  default="mixtral", hint="mixtral and glm4_moe of llama and mistral; qwen2_moe and glm4_moe of qwen2"),
            Field("router", "Routers", options=("fitted", "prototypes"), default="fitted",
                  labels=("fitted to right answers", "prototypes of texts")),
            Field("top_k", "Experts a token keeps", "number", hint="searched unless given"),
            Field("groups", "Groups of layers", "number", hint="with a temperature each; one unless given"),
        ),
    ),
    Group(
        "state_dict", "Tensors of any network", "image models and other files of tensors, block by block",
        (
            replace(_METHOD, default="linear", options=_METHOD.options[1:], hint="any that goes by weights alone"),
            Field("groups", "Numbers for", "pairs", default="blocks", suggestions=("blocks", "model"),
                  example="text=TEXT, in=IN*, attention=*attn*",
                  hint="each named block, the whole model, or groups by patterns of names and blocks"),
            Field("keys", "Tensors not in all", options=("", "union", "intersection"),
                  labels=("refused", "copied from the first that has them", "left out")),
        ),
    ),
    Group(
        "prompts", "Prompts", "which soft prompts or prefixes stand before every text",
        (
            Field("tokens", "Most tokens", "number", hint="before a text; all prompts together unless given"),
            Field("block", "Chosen at once", "number", hint="so many tokens; 4 unless given"),
            Field("arithmetic", "Mixed row by row", "switch", hint="of prompts that began as the same text"),
        ),
    ),
)  # fmt: skip

_METRIC = "Metric"
_FILE = Field("file", "File of items", example="items.jsonl", hint="JSON objects, one on each line", required=True)
_HELD_OUT = Field("held_out", "Held out", "number", example="0.5", hint="the share of items to confirm on")
_PROMPT = Field("prompt", "Prompt", example="{prompt}", hint="{question} stands for that field of an item")
_ANSWER = Field("answer", "Answer", example=" {answer}", hint="a space between prompt and answer belongs here")
_TOKENS = Field("max_new_tokens", "Max. new tokens", "number", example="256")
_SHOTS = Field("num_fewshot", "Few-shot examples", "number", hint="put before each question")
_CHAT = (
    Field("apply_chat_template", "Chat template", "switch", hint="of the model's tokenizer, for chat models"),
    Field("system_instruction", "System instruction", hint="text before every prompt"),
    Field("max_length", "Max. length", "number", hint="tokens of prompt and answer; the model's context unless given"),
)


def _metric(*names: str) -> Field:
    return Field("metric", _METRIC, default=names[0], suggestions=names, required=True)


_OWN_EVALUATORS = (
    Group(
        "lm_eval", "an lm-eval task", "Any task of lm-eval, or one of this project's own.",
        (
            Field("task", "Task", example="gsm8k", required=True,
                  suggestions=("mini_math_ja", "mini_math_en", "mini_translate_ja", "gsm8k", "mgsm_direct_ja")),
            Field("metric", _METRIC, example="exact_match,flexible-extract", required=True,
                  suggestions=("acc", "acc_ja", "acc_norm", "exact_match", "exact_match,flexible-extract")),
            Field("search", "Search split", default="validation", hint="a split, also a slice: test[:250]"),
            Field("held_out", "Held-out split", "text", default="test", hint="no item may be in both"),
            _SHOTS, *_CHAT,
            Field("batch_size", "Batch size", "number", hint="prompts at once"),
        ),
    ),
    Group(
        "mgsm", "MGSM word problems", "Word problems in seven languages, scored as the original work does, or exactly.",
        (
            Field("language", "Language", options=("ja", "en", "de", "es", "fr", "ru", "zh"), default="ja"),
            Field("scorer", "Scorer", options=("exact", "sakana"), default="exact"),
            _metric("acc_exact", "acc_ja_exact", "acc_sakana", "acc_ja_sakana"),
            Field("file", "File of problems", hint="the hub's unless given"), _HELD_OUT, _TOKENS, _SHOTS, *_CHAT,
        ),
    ),
    Group(
        "multiple_choice", "multiple choice", "Which choice is the likeliest. Quick: nothing is decoded.",
        (_FILE, _metric("acc", "acc_norm", "acc_bytes", "margin"), _PROMPT, _HELD_OUT, _SHOTS, *_CHAT),
    ),
    Group(
        "likelihood", "likelihood of answers",
        "Log-probability of the right answers. Quick, and it moves where no answer changes yet.",
        (
            _FILE, _metric("log_likelihood", "bits_per_byte"), _PROMPT, _ANSWER, _HELD_OUT, _SHOTS, *_CHAT,
        ),
    ),
    Group(
        "rouge", "ROUGE-L", "How much of a reference an answer says.",
        (
            _FILE, _metric("rouge_l"), _PROMPT, Field("answer", "Reference", example="{answer}"), _HELD_OUT, _TOKENS,
            _SHOTS, *_CHAT,
        ),
    ),
    Group(
        "language", "language of answers", "Whether answers are in a language; good as a second objective.",
        (
            _FILE, _metric("in_language"), Field("language", "Language", example="ja"), _PROMPT, _HELD_OUT, _TOKENS,
            *_CHAT,
        ),
    ),
    Group(
        "reward_model", "reward model", "How another model likes the answers.",
        (
            _FILE, _metric("reward"), Field("model", "Reward model", example="org/name", required=True), _PROMPT,
            _HELD_OUT, _TOKENS, *_CHAT,
        ),
    ),
    Group(
        "python", "a Python function of yours",
        "It is code, which this page does not start: copy the search file, add `allow_task_code: true`, and run "
        "`evomerge search FILE`.",
        (
            Field("file", "File of the function", example="score.py", required=True),
            Field("given", "Is given", options=("generate", "weights"),
                  labels=("the model, to ask it", "where the candidate's tensors lie"), default="generate",
                  hint="tensors of any network are given as files"),
            Field("items_file", "File of items", example="items.jsonl", hint=_FILE.hint, required=True),
            Field("metrics", "Metrics", "pairs", example="reward=maximize", required=True),
            Field("metric", _METRIC, example="reward", required=True),
            _HELD_OUT,
        ),
    ),
    Group(
        "cost", "cost of running it", "Layers, parameters or speed: for smaller and faster models.",
        (
            _metric("layers", "parameters", "tokens_per_second"),
            Field("measure", "Measure the speed", "switch", hint="for tokens_per_second"),
        ),
    ),
    Group(
        "change", "change of the weights", "How far a merge is from another model, such as the base.",
        (_metric("change"), Field("model", "The other model", example="org/name", required=True)),
    ),
)  # fmt: skip

SEVERAL = "nsga2"
"""The optimizer that the form suggests for several objectives."""

# Labels and hints for sections of the search file. The keys, their order and their types are in its schema.
_WORDS: dict[str, dict[str, Any]] = {
    "calibration.file": {"label": "Texts", "example": "texts.jsonl", "hint": "lines, or JSON objects with a text each"},
    "calibration.sources": {
        "label": "Texts of single sources", "example": "maths=maths.txt, chat=chat.txt",
        "hint": "where a source has texts of its own task",
    },
    "calibration.prompts": {"hint": "how many of the texts count, from the first"},
    "calibration.tokens": {"hint": "of each text"},
    "fit.items": {"label": "Fit: items", "hint": "the first so many of the file"},
    "fit.drawn": {"label": "Fit: items a step"},
    "fit.steps": {"label": "Fit: steps"},
    "fit.rate": {"label": "Fit: rate", "hint": "the learning rate of the first step"},
    "proxy.drawn": {"label": "Proxy: items a step"},
    "proxy.steps": {"label": "Proxy: steps", "hint": "for each generation; two points of them are scored"},
    "proxy.rate": {"label": "Proxy: rate", "hint": "how far a step goes, in parts of each parameter's range"},
    "select.keep": {"label": "Sources to search", "hint": "of many; leave it empty to search over all"},
    "select.rungs": {"label": "Items of each", "hint": "after this many, sources that are surely worse drop out"},
    "select.confidence": {"label": "Confidence", "hint": "in each comparison"},
    "select.rest": {"label": "The others", "hint": "as one averaged source, or not at all"},
    "select.norm_ratio": {"label": "Longest change", "hint": "times the median; longer ones are scaled down"},
    "racing.rungs": {
        "label": "Racing: rungs", "example": "50, 150", "hint": "after this many items the worst drop out",
    },
    "racing.confidence": {"label": "Racing: confidence", "hint": "in each comparison"},
    "racing.estimate": {"label": "Racing: estimate", "hint": "what predicts the scores of the other items"},
    "optimizer.name": {
        "label": "Optimizer", "default": "cma", "options": tuple(plugins("evomerge.optimizers")),
        "hint": "several objectives: nsga2, nsga3, tpe, gp; paths: catcma",
    },
    "budget.candidates": {"default": "100", "hint": "including each source alone and their average"},
    "budget.patience": {"hint": "generations without a change of the front"},
    "budget.cost": {"hint": "in money, by the prices of workers in the search file"},
    "confirm.top": {"label": "Confirm: top", "hint": "on the held-out split, beside the front"},
    "confirm.drawn": {"label": "Confirm: drawn", "hint": "more of the best, to draw the winner's curse"},
    "confirm.confidence": {"label": "Confirm: confidence", "hint": "of all intervals together"},
    "cluster.workers": {"hint": "of Ray; as many as fit unless given"},
}  # fmt: skip

_POPULATION = Field(
    "optimizer.population", "Population", "number", hint="4 + 3 ln(parameters) unless given"
)  # every optimizer of this project has it, but it is not in the section's schema


def _answers(section: str, hint: str) -> tuple[Field, ...]:
    """The fields for right answers in a section that has the keys of the evaluator ``likelihood``."""
    fields = (replace(_FILE, label="Right answers", hint=hint), _PROMPT, _ANSWER, _CHAT[0])
    return tuple(replace(field, key=f"{section}.{field.key}", required=False) for field in fields)


_PROXY = (
    *_answers("proxy", "JSON objects, one on each line; of the search split alone"),
    Field("proxy.held_out_file", "Held out of them", hint="a file of items that must not be learned from"),
)

_START = Field("start_from", "Start from", example="search-1", hint="an earlier search over the same sources")

_POOL = Field("pool", "Workers run in", options=("", "ray"), labels=("this process, one", "Ray, several at once"))


def sections(searches: Sequence[str] = ()) -> dict[str, tuple[Field, ...]]:
    """The fields of the parts of the form that write sections of the search file. Keys are prefixed with the section.

    Args:
        searches: the names of existing searches, which a new one may start from.
    """
    return {
        "calibration": _section("calibration"),
        "select": _section("select"),
        "budget": _section("budget"),
        "optimizer": (*_section("optimizer"), _POPULATION, replace(_START, suggestions=tuple(searches))),
        "fit": (
            *_answers("fit", "JSON objects, one on each line; of neither split"),
            *_section("fit", "items", "drawn", "steps", "rate"),
        ),
        "proxy": (*_PROXY, *_section("proxy", "drawn", "steps", "rate")),
        "workers": (_POOL, *_section("cluster", "workers")),
        "more": (*_section("racing"), *_section("confirm")),
    }


def _section(name: str, *chosen: str) -> tuple[Field, ...]:
    """A field for every key of a section of the search file, or for the chosen ones."""
    schema = SearchFile.model_json_schema()
    described = schema["properties"][name]
    (reference,) = (part["$ref"] for part in (described, *described.get("anyOf", ())) if "$ref" in part)
    section = schema["$defs"][reference.rpartition("/")[2]]
    fields = [field for field in _drawn(section, schema["$defs"]) if not chosen or field.key in chosen]
    # No field is required: an empty section is left out.
    return tuple(
        replace(field, **{"key": key, "required": False, **_WORDS.get(key, {})})
        for field in fields
        for key in [f"{name}.{field.key}"]
    )


# ---- what packages bring ---------------------------------------------------------------------------------------------


def spaces() -> tuple[Group, ...]:
    """All installed search spaces."""
    return (*_OWN_SPACES, *_added("evomerge.search_spaces", SpaceSettings, "kind"))


def evaluators() -> tuple[Group, ...]:
    """All installed evaluators."""
    metric = Field("metric", _METRIC, required=True)
    return (*_OWN_EVALUATORS, *_added("evomerge.evaluators", EvaluatorSettings, "evaluator", metric))


def optimizers() -> tuple[Group, ...]:
    """The optimizers of other packages, with their own settings."""
    return tuple(_added("evomerge.optimizers", Settings, "name", without="population"))


def _added(group: str, base: type[BaseModel], key: str, *before: Field, without: str = "") -> Iterator[Group]:
    """The parts of other packages; one that cannot be loaded is logged and left out."""
    for name in plugins(group):
        if name in OWN[group]:
            continue
        try:
            settings = find_class(group, name, group, base)
            fields = [field for field in fields_of(settings) if field.key not in (key, without)]
        except (InputError, PydanticUserError) as error:
            log.warning("the form has no %s: %s", name, error)
            continue
        about = (settings.__doc__ or "").strip().partition("\n")[0]
        yield Group(name, name.replace("_", " "), about, (*before, *fields))


def fields_of(settings: type[BaseModel]) -> Iterator[Field]:
    """A field for every setting of a class that fits into a single field, from its JSON schema.

    An empty field is left out of the search file, so the setting has its default, which is shown as an example.
    """
    schema = settings.model_json_schema()
    yield from _drawn(schema, schema.get("$defs", {}))


def _drawn(schema: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[Field]:
    for key, described in schema.get("properties", {}).items():
        form = _form_of(described, known)
        if form is None:
            continue
        default = described.get("default")
        yes = form[0] == "switch" and default is True  # an unchecked box cannot override a default of true
        yield Field(
            key,
            str(described.get("title", key)),
            "text" if yes else form[0],
            hint=str(described.get("description", "")),
            example="" if default is None or form[0] == "pairs" else str(default),
            required=key in schema.get("required", []),
            options=("", "true", "false") if yes else form[1],
        )


def _form_of(
    described: Mapping[str, Any], known: Mapping[str, Any]
) -> tuple[Literal["text", "number", "numbers", "pairs", "switch"], tuple[str, ...]] | None:
    """The kind of field that a schema needs, and its options; None for objects that do not fit into a field."""
    if "$ref" in described:
        return _form_of(known.get(described["$ref"].rpartition("/")[2], {}), known)
    if "enum" in described:
        return "text", ("", *map(str, described["enum"]))
    forms = [form for alternative in described.get("anyOf", ()) if (form := _form_of(alternative, known)) is not None]
    if forms:
        return forms[0]
    match described.get("type"):
        case "integer" | "number":
            return "number", ()
        case "boolean":
            return "switch", ()
        case "string":
            return "text", ()
        case "array" if described.get("items", {}).get("type") in ("integer", "number"):
            return "numbers", ()
        case "object" if all(_is_text(value) for value in _values(described)):
            return "pairs", ()
    return None


def _values(described: Mapping[str, Any]) -> list[Any]:
    """The schemas of the values of an object; by default anything is allowed."""
    return [*described.get("patternProperties", {}).values()] or [described.get("additionalProperties", True)]


def _is_text(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") == "string"
