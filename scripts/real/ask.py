"""Asks a model one question per skill, with plain transformers: python scripts/real/ask.py FOLDER."""

from __future__ import annotations

import sys

from skills import SKILLS, different
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for skill in SKILLS:
        (item,) = different(skill, 1, seed=1)
        talk = [{"role": "user", "content": item.question}]
        asked = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = model.generate(**asked, max_new_tokens=40, do_sample=False)
        answer = tokenizer.decode(tokens[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{item.question}\n    {answer.strip()}")


if __name__ == "__main__":
    main(sys.argv[1])
