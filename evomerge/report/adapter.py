"""The card of an extracted adapter."""

from __future__ import annotations

from evomerge import __version__
from evomerge.checkpoints.source import Source
from evomerge.extraction.adapter import REPORT, Extraction
from evomerge.report.licences import CARD, UNKNOWN, licence_of
from evomerge.report.public_names import is_public, public_name

_TEXT = """\
{head}
# {title}

What `{model}` adds to `{base}`, as a LoRA adapter of rank {rank}: {lost:.2%} of the energy of the change (the sum of
squares over all weights) is not in it. `{report}` says how much of each tensor. Scales are 1 in every module.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{title}")
```

Made with Evomerge {version}: `evomerge extract`.
"""


def card(title: str, model: Source, base: Source, made: Extraction) -> dict[str, str]:
    """The adapter's README.md, by that name."""
    lines = ["library_name: peft", "tags:", "- lora"]
    if is_public(base):
        lines.insert(0, f"base_model: {public_name(base)}")
    if (licence := licence_of(model.folder)) != UNKNOWN:
        lines.append(f"license: {licence}")
    head = "\n".join(["---", *lines, "---"])
    text = _TEXT.format(
        head=head, title=title, model=public_name(model), base=public_name(base), rank=made.rank, lost=made.lost,
        report=REPORT, version=__version__,
    )  # fmt: skip
    return {CARD: text}
