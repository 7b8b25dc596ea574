"""Exports prompts as folders: a soft prompt in the vocabulary of a plain model, a prefix in peft's format."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from evomerge.checkpoints.checks import check_written
from evomerge.checkpoints.folder import load_json
from evomerge.checkpoints.live import LiveModel
from evomerge.checkpoints.placement import Devices
from evomerge.checkpoints.plain import plain_model
from evomerge.checkpoints.prompt_configs import CONFIG
from evomerge.checkpoints.prompts import ROWS, WEIGHTS, key_value_heads
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.structure import empty_model, parse_config
from evomerge.checkpoints.target import check_target
from evomerge.errors import InputError
from evomerge.merging.building.export import add_companions, writing
from evomerge.merging.materialise import Materialiser
from evomerge.merging.path import merged_config
from evomerge.prompts.soft import Vocabulary, longer_config, losing_rows, with_rows
from evomerge.prompts.tokens import PromptTokens
from evomerge.recipes.prompts import PromptsRecipe
from evomerge.recipes.stack import StackRecipe

if TYPE_CHECKING:
    from evomerge.checkpoints.writer import Layout

_GENERATION = "generation_config.json"


def write_soft(
    copy: StackRecipe,
    base: Source,
    out: Path,
    rows: Tensor,
    tokens: PromptTokens,
    *,
    texts: Mapping[str, str],
    check: Callable[[Path], None] | None,
    progress: Callable[[int, int], None],
) -> None:
    """Create a plain model folder with a soft prompt in its vocabulary; see ``export.write_model``.

    Args:
        copy: the recipe of the base alone.
        base: its source.
        rows: [rows, width], as stored in the embedding, float32.
        tokens: the tokens that represent them.
    """
    materialiser = Materialiser({copy.tokenizer: base})
    names = _names(base)
    stored = {name: (tuple(shape), dtype) for name, shape, dtype in materialiser.layout(copy)}
    own = _vocabulary(materialiser, copy, names)
    longer = with_rows(own, rows, tokens.first, losing_rows(own, tokens.first))
    made = {names[part]: tensor for part, tensor in vars(longer).items() if tensor is not None}
    layout: Layout = [
        *((name, made[name].shape if name in made else shape, dtype) for name, (shape, dtype) in stored.items()),
        *((name, tensor.shape, tensor.dtype) for name, tensor in made.items() if name not in stored),
    ]
    config = merged_config(copy, {copy.tokenizer: base}) | dict(longer_config(len(longer.embedding)))
    check_written(config, {name: tuple(shape) for name, shape, _ in layout}, base.place)
    sources = {copy.tokenizer: replace(base, tokenizer_texts=tokens.texts)}
    beside = {_GENERATION: _generation_text(base, tokens.first, len(rows)), "config.json": _dump(config), **texts}

    def tensors(done: set[str]) -> Iterator[tuple[str, Tensor]]:
        yield from materialiser.tensors(copy, done | made.keys())
        yield from ((name, tensor) for name, tensor in made.items() if name not in done)

    with writing(out, layout, tensors, sources=sources, key=None, progress=progress) as folder:
        add_companions(folder, sources[copy.tokenizer], beside)
        if check is not None:
            check(folder.complete())


def _names(base: Source) -> dict[str, str]:
    """The names of embedding, head and bias in the folder of an untied model of the base's kind."""
    model = empty_model(parse_config(base.config, base.place), base.place)
    modules = {module: name for name, module in model.named_modules()}
    embedding, head = modules[model.get_input_embeddings()], modules[model.get_output_embeddings()]
    by_part = {part.tensor: name for name, part in base.parts.items()}
    parts = {"embedding": f"{embedding}.weight", "head": f"{head}.weight", "bias": f"{head}.bias"}
    return {part: by_part.get(name, name) for part, name in parts.items()}


def _vocabulary(materialiser: Materialiser, copy: StackRecipe, names: Mapping[str, str]) -> Vocabulary:
    """Embedding and head of the base as exported; a tied head is the embedding."""
    others = {name for name, _, _ in materialiser.layout(copy)} - set(names.values())
    found = dict(materialiser.tensors(copy, others))
    embedding = found[names["embedding"]]
    return Vocabulary(embedding, found.get(names["head"], embedding), found.get(names["bias"]))


def _generation_text(base: Source, first: int, rows: int) -> str:
    """The generation settings, which also prevent the new tokens from being sampled."""
    file = base.folder / _GENERATION
    ends: dict[str, Any] = {
        key: base.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in base.config
    }
    content = load_json(file, base.place) if file.exists() else ends
    suppressed = [*(content.get("suppress_tokens") or ()), *range(first, first + rows)]
    return _dump({**content, "suppress_tokens": suppressed})


def reload_soft(folder: Path, devices: Devices) -> LiveModel:
    """Load the folder with plain transformers.

    Its setting that prevents sampling new tokens is removed: greedy decoding never produces them anyway, and with the
    setting, transformers' own loop would decode every batch until its longest row.
    """
    live = plain_model(open_source("export", str(folder), place=str(folder)), devices, None)
    live.model.generation_config.suppress_tokens = None
    return live


def write_prefix(
    recipe: PromptsRecipe,
    base: Source,
    out: Path,
    prefix: Tensor,
    *,
    texts: Mapping[str, str],
    check: Callable[[Path], None] | None,
) -> None:
    """Create peft's folder for a prefix [rows, columns], float32."""
    check_target(out, [base.folder])
    heads, width = key_value_heads(base.settings)
    named = recipe.sources[recipe.base]
    config = {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": str(base.folder) if Path(named).expanduser().exists() else named,
        "num_virtual_tokens": len(prefix), "token_dim": heads * width, "num_attention_heads": heads,
        "num_layers": base.layers, "num_transformer_submodules": 1, "encoder_hidden_size": heads * width,
        "prefix_projection": False,
    }  # fmt: skip
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        save_file({ROWS: prefix.contiguous()}, made / WEIGHTS, metadata={"format": "pt"})
        for name, text in {**texts, CONFIG: _dump(config)}.items():
            (made / name).write_text(text, encoding="utf-8")
        if check is not None:
            check(made)
        made.chmod(0o755)
        made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def reload_prefix(folder: Path, base: Source, devices: Devices, dtype: torch.dtype | None) -> LiveModel:
    """Load the folder with peft, on the base in plain transformers.

    Raises:
        InputError: peft is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError:
        problem = "is a prefix, which peft loads, and peft is not installed here"
        raise InputError(
            str(folder), problem, "Install it (`pip install peft`), or export with `--no-verify`."
        ) from None
    live = plain_model(base, devices, dtype)
    return LiveModel(PeftModel.from_pretrained(live.model, folder).eval(), live.tokenizer, devices=live.devices)


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
