"""The fields of the form for a new search: the keys of the search file that people set most.

Names are written out, for the classes that hold them take seconds to import; tests hold this list to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Field:
    """A key of the search file as a field: a list of ``options``, a text with ``suggestions``, or a switch.

    ``labels`` are what people read of the options, the options themselves unless given.
    """

    key: str
    label: str
    kind: Literal["text", "number", "numbers", "switch"] = "text"
    default: str | bool = ""
    hint: str = ""
    example: str = ""
    required: bool = False
    options: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """An evaluator or a space: its name in the search file, its name for people, what it is, and its fields."""

    name: str
    label: str
    hint: str
    fields: tuple[Field, ...]


METHODS = (
    "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs",
    "breadcrumbs_ties", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce", "ram", "ramplus_tl",
    "arcee_fusion", "nearswap", "passthrough",
)  # fmt: skip

_ENCODING = Field("encoding", "Encoding", options=("blocks", "indicators", "integers", "pruning"), default="blocks")
_MAX_HOPS = Field("max_hops", "Longest path", "number", hint="in layers; twice the layers of a source unless given")
_SCALING = Field(
    "scaling",
    "Scaling",
    options=("", "stream", "update"),
    hint="what a layer's scale multiplies: the residual stream, or its update",
)

SPACES = (
    Group(
        "parameter_space", "Weights", "how much of each source goes into each layer",
        (
            Field("method", "Method", default="task_arithmetic", options=METHODS),
            Field("granularity", "Granularity", options=("model", "layer", "block"), default="model",
                  hint="what has numbers of its own; by hand also a number of layers"),
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
            Field("method", "Method", default="task_arithmetic", options=("linear", "task_arithmetic")),
            Field("granularity", "Weights for", default="model", options=("model", "hop"),
                  labels=("the whole model", "each layer on the path")),
            Field("encoding", "Encoding", options=("pruning", "integers", "blocks", "indicators"), default="pruning"),
            _MAX_HOPS,
            _SCALING,
        ),
    ),
)  # fmt: skip

_METRIC = "Metric"
_FILE = Field("file", "File of items", example="items.jsonl", hint="JSON objects, one on each line", required=True)
_HELD_OUT = Field("held_out", "Held out", "number", example="0.5", hint="the share of items to confirm on")
_PROMPT = Field("prompt", "Prompt", example="{prompt}", hint="{question} stands for that field of an item")
_TOKENS = Field("max_new_tokens", "Max. new tokens", "number", example="256")
_SHOTS = Field("num_fewshot", "Few-shot examples", "number", hint="put before each question")
_CHAT = (
    Field("apply_chat_template", "Chat template", "switch", hint="of the model's tokenizer, for chat models"),
    Field("system_instruction", "System instruction", hint="text before every prompt"),
    Field("max_length", "Max. length", "number", hint="tokens of prompt and answer; the model's context unless given"),
)


def _metric(*names: str) -> Field:
    return Field("metric", _METRIC, default=names[0], suggestions=names, required=True)


EVALUATORS = (
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
            _FILE, _metric("log_likelihood", "bits_per_byte"), _PROMPT,
            Field("answer", "Answer", example=" {answer}", hint="a space between prompt and answer belongs here"),
            _HELD_OUT, _SHOTS, *_CHAT,
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

BUDGET = (
    Field(
        "candidates",
        "Candidates",
        "number",
        default="100",
        hint="the sources alone and their average included",
    ),
    Field("hours", "Hours", "number"),
    Field("patience", "Patience", "number", hint="generations without a change of the front"),
)

SEVERAL = "nsga2"
"""The optimizer that the form proposes for several objectives."""

OPTIMIZER = (
    Field("name", "Optimizer", default="cma",
          options=("cma", "lq_cma", "catcma", "nsga2", "nsga3", "tpe", "gp", "random", "qmc", "greedy_soup"),
          hint="several objectives: nsga2, nsga3, tpe, gp; paths: catcma"),
    Field("population", "Population", "number", hint="4 + 3 ln(parameters) unless given"),
)  # fmt: skip

MORE = (
    Field("rungs", "Racing: rungs", "numbers", example="50, 150", hint="after so many items the worst drop out"),
    Field("top", "Confirm: top", "number", example="5", hint="on the held-out split, beside the front"),
    Field("drawn", "Confirm: drawn", "number", example="0", hint="more of the best, to draw the winner's curse"),
)

WORKERS = (
    Field("pool", "Workers run in", options=("", "ray"), labels=("this process, one", "Ray, several at once")),
    Field("workers", "Workers", "number", hint="of Ray; as many as fit unless given"),
)
