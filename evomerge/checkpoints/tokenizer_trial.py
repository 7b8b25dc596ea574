"""Tries out a tokenizer in a separate process with limited time and memory: a regular expression or a template in it
may never terminate, and a normalizer may expand a text until the process is aborted.

Run as a program it imports only the tokenizers library and Jinja. Successful trials are recorded in the user's cache by
the content of the files, because starting the process takes a third of a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

_CPU_SECONDS, _MAX_SECONDS = 4, 120
_MEMORY_BYTES, _MEMORY_A_BYTE = 1_500_000_000, 20  # address space: a fixed amount, and an amount per byte of the file
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_TEXTS = (
    "The quick brown fox jumps over the lazy dog, doesn't it?\n\n  def f(x): return x ** 2  # 1,234.5 %\n",
    "二つの素数の和は常に偶数であるか。Ответ: нет! ¿Qué? \U0001f600",
    *(piece * 500 + "!" for piece in ("a", "aA", " ", "1", "\n", "?", "a b ", "あ", "-_-")),
)
_MAX_GROWTH, _MAX_ADDED = 20, 1_000  # tokens or characters per byte, and in addition
_TALK = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]


def trial(folder: Path) -> str:
    """What is wrong with the tokenizer of a checked folder; empty if it handles a few texts."""
    from platformdirs import user_cache_path

    passed = user_cache_path("evomerge") / "tokenizers" / _key(folder)
    if passed.exists():
        return ""
    problem = _run(folder)
    if not problem:
        with suppress(OSError):  # a read-only home only costs time
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()
    return problem


def _key(folder: Path) -> str:
    whole = hashlib.sha256((metadata.version("tokenizers") + Path(__file__).read_text("utf-8")).encode())
    for file in (*(folder / name for name in _FILES), *_named_templates(folder)):
        if file.is_file():
            whole.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()[:32]


def _run(folder: Path) -> str:
    command = [sys.executable, "-P", __file__, str(folder), str(_CPU_SECONDS)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    try:
        process = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_MAX_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"a few texts took it more than {_MAX_SECONDS} s"
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"a few texts took it more than {_CPU_SECONDS} s"
    if process.returncode < 0:
        return "a few texts took it more memory than any tokenizer needs"
    if process.returncode == 0:
        return ""
    lines = (process.stdout or process.stderr).decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"its trial ended with code {process.returncode}"


def _try(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in _TEXTS:
        most = _MAX_GROWTH * len(text.encode()) + _MAX_ADDED
        ids = tokenizer.encode(text).ids
        if len(ids) > most or len(tokenizer.decode(ids)) > most:
            raise ValueError(f"it makes far more of a text of {len(text)} characters than that")
    for template in _templates(folder):
        rendered = _render(template)
        if len(rendered) > 1_000_000:
            raise ValueError(f"its chat template makes {len(rendered):,} characters of a question")


def _templates(folder: Path) -> Iterator[str]:
    for file in (folder / "chat_template.jinja", *_named_templates(folder)):
        if file.is_file():
            yield file.read_text("utf-8")
    if (folder / "tokenizer_config.json").is_file():
        templates = json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("chat_template")
        for template in templates if isinstance(templates, list) else [templates]:
            text = template.get("template") if isinstance(template, dict) else template
            if isinstance(text, str):
                yield text


def _named_templates(folder: Path) -> list[Path]:
    return sorted(folder.glob("additional_chat_templates/*.jinja"))


def _render(template: str) -> str:
    """Render a conversation with a chat template; errors that depend on context are ignored and reported on use."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return environment.from_string(template).render(messages=_TALK, add_generation_prompt=True)
    except MemoryError:
        raise
    except Exception:
        return ""


def _limit(kind: int, most: int) -> None:
    """Lower a limit of this process, unless it is lower already."""
    soft, hard = resource.getrlimit(kind)
    most = min(most, *(known for known in (soft, hard) if known != resource.RLIM_INFINITY), most)
    resource.setrlimit(kind, (most, most))


def main(folder: Path, seconds: int) -> int:
    """Try the tokenizer of a folder with a limit on CPU time; print what is wrong."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, seconds)
    _limit(resource.RLIMIT_AS, _MEMORY_BYTES + _MEMORY_A_BYTE * (folder / "tokenizer.json").stat().st_size)
    try:
        _try(folder)
    except BaseException as error:  # the library's panics are not subclasses of Exception
        lines: Any = str(error).strip().splitlines() or [""]
        print(f"{type(error).__name__}: {lines[0][:500]}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
