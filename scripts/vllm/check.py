"""Exported models in vLLM: the same greedy text as in transformers. Run by scripts/test-vllm, once in each environment.

python scripts/vllm/check.py export FOLDER      # in evomerge's environment: write models and transformers' answers
python scripts/vllm/check.py generate FOLDER    # in vLLM's environment: give the same answers, or fail
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROMPTS = 20
TOKENS = 32
MIXTURES = {
    "mixtral": "mixtral", "qwen2_moe": "qwen2_moe", "qwen3_moe": "qwen3_moe", "glm4_moe": "glm4_moe",
    "glm4_moe_unequal": "glm4_moe",
}  # fmt: skip
"""The architectures of mixtures, by folder: made of the miniatures, which are Llamas, or of random Qwen3 models."""


def export(folder: Path) -> None:
    """Write a single source, a merge, mixtures, and paths with and without scales, each with transformers' answers."""
    from evomerge.checkpoints.source import open_source
    from evomerge.merging.building.export import write_model
    from evomerge.recipes.stack import Blend, StackRecipe

    miniatures = ROOT / "examples" / "miniatures"
    sources = {name: open_source(name, str(miniatures / name), place=name) for name in ("base", "maths", "japanese")}
    copies = [Blend(method="passthrough", sources=(n,), parameters={"scale": {n: 1.0}}) for n in ("maths", "japanese")]
    maths, japanese = copies
    both = Blend(
        method="task_arithmetic", sources=("maths", "japanese"), base="base",
        parameters={"weight": {"maths": 0.8, "japanese": 0.9}},
    )  # fmt: skip
    lower, upper = [(0, maths), (1, maths), (2, maths)], [(3, japanese), (4, japanese), (5, maths)]
    paths: dict[str, tuple[list[tuple[int, Blend]], list[float] | None]] = {
        "source": ([(layer, maths) for layer in range(6)], None),
        "merge": ([(layer, both) for layer in range(6)], None),
        "path": ([*lower, *upper], None),
        "repeats": ([*lower, (2, maths), *upper], None),
        "scaled": ([*lower, *upper], [0.9, 1.1, 1.2, 0.8, 1.05, 1.0]),
    }
    for name, (hops, scales) in paths.items():
        ends = hops[0][1]
        recipe = StackRecipe.compose(
            sources=dict.fromkeys(sources, ""), tokenizer="maths", dtype="float32",
            embedding=ends, norm=ends, head=ends, hops=[(layer, b, b, b) for layer, b in hops], scales=scales,
        )  # fmt: skip
        write_model(recipe, sources, folder / name, texts={})
    with tempfile.TemporaryDirectory() as above:
        qwens = random_qwens(Path(above), sources)
        for name in MIXTURES:
            export_mixture(folder / name, qwens if name == "qwen3_moe" else sources, [maths, both])
    export_adapter(folder)
    for name in (*paths, *MIXTURES):
        (folder / f"{name}.json").write_text(json.dumps(transformers_answers(folder / name)))


def export_adapter(folder: Path) -> None:
    """Write the adapter of a fine-tune in the form that vLLM reads, and the answers of PEFT's model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from evomerge.checkpoints.source import open_source
    from evomerge.extraction.adapter import extract
    from evomerge.extraction.factors import RankRule
    from evomerge.extraction.held import Extracting

    maths, base = (open_source(n, str(ROOT / "examples" / "miniatures" / n), place=n) for n in ("maths", "base"))
    extract(maths, base, folder / "adapter", Extracting(RankRule(energy=0.9), preset="vllm"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), str(folder / "adapter"))
    answers = transformers_answers(base.folder, adapted.eval())
    (folder / "adapter.json").write_text(json.dumps(answers))


def random_qwens(above: Path, sources: dict[str, Any]) -> dict[str, Any]:
    """Sources with the same names and tokenizer, of the architecture of which a qwen3_moe can be made."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from evomerge.checkpoints.source import open_source

    config = Qwen3Config(
        vocab_size=sources["maths"].config["vocab_size"], hidden_size=64, intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    for seed, (name, source) in enumerate(sources.items()):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(above / name)
        for file in source.folder.glob("tokenizer*"):
            shutil.copy(file, above / name)
    return {name: open_source(name, str(above / name), place=name) for name in sources}


def export_mixture(out: Path, sources: dict[str, Any], experts: list[Any]) -> None:
    """Write a mixture of two experts, the second of whose blends makes the rest too; it alone is in some layers of one
    that is unequal.
    """
    from evomerge.merging.building.builders import BuildContext
    from evomerge.mixture.builder import MixtureBuilder
    from evomerge.recipes.mixture import MixtureRecipe, SlotGroup, SlotRouter

    slots, is_equal = {"maths": 0, "both": 1}, out.name in MIXTURES.values()
    groups = (SlotGroup(layers=3, slots=slots), SlotGroup(layers=3, slots=slots if is_equal else {"both": 1}))
    recipe = MixtureRecipe(
        sources=dict.fromkeys(sources, ""), tokenizer="maths", dtype="float32", architecture=MIXTURES[out.name],
        blends=tuple(experts), rest=1, embedding=1, groups=groups, top_k=2 if is_equal else 1,
        router=SlotRouter(kind="random", rest=1, slots=slots),
    )  # fmt: skip
    MixtureBuilder(BuildContext(sources, "maths")).export(recipe, out, texts={})


def prompts() -> list[str]:
    lines = (ROOT / "evaluators/tasks/data/mini_math_ja.search.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:PROMPTS]]


def transformers_answers(model: Path, loaded: Any = None) -> list[list[int]]:
    """Greedy answers of the model in a folder, or of a loaded one, with the folder's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model).eval() if loaded is None else loaded
    answers = []
    for prompt in prompts():
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.inference_mode():
            answer = loaded.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)
        answers.append(answer[0, ids.shape[1] :].tolist())
    return answers


def generate(folder: Path) -> int:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    counts = {}
    for expected_file in sorted(folder.glob("*.json")):
        model = folder / expected_file.stem
        is_adapter = (model / "adapter_config.json").exists()
        base, rank = (ROOT / "examples" / "miniatures" / "base", 64) if is_adapter else (model, 16)
        engine: Any = LLM(
            model=str(base), dtype="float32", enforce_eager=True, max_model_len=128, enable_lora=is_adapter,
            max_lora_rank=rank,
        )  # fmt: skip
        lora = LoRARequest(model.name, 1, str(model)) if is_adapter else None
        asked = engine.generate(
            prompts(), SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False, lora_request=lora
        )
        answers = [list(output.outputs[0].token_ids) for output in asked]
        expected = json.loads(expected_file.read_text())
        counts[model.name] = sum(a == b for a, b in zip(answers, expected, strict=True)), len(expected)
        del engine
    for name, (same, count) in counts.items():
        print(f"{name:10} {same} of {count} answers are the same in vLLM")
    return sum(same != count for same, count in counts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("export", "generate"))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    if given.what == "export":
        export(given.folder)
    else:
        sys.exit(generate(given.folder))


if __name__ == "__main__":
    main()
