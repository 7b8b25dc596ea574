"""Checking search files and inspecting models beside the server, in ``python -m evomerge.service.checking``.

What opens models takes seconds to import and gigabytes while it works, and a file that it chokes on must not end the
server. So one such process stays, takes a question in each line of its input, and answers in a line; it ends with the
server, and is ended when an answer takes too long.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import InputError
from evomerge.search.folder import STORE_VARIABLE
from evomerge.service.bodies import Plan, PlanRow
from evomerge.service.problems import ProblemError
from evomerge.service.processes import TOKEN_VARIABLE
from evomerge.service.root import Root

MOST_S = 300.0
"""How long an answer may take. A model from the hub that is not on this machine yet may take longer: it goes on
downloading the next time from where it was."""


class Checker:
    """Asks the process, one question at a time; starts it when it is first needed."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._turn = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def plan(self, text: str, folders: Sequence[Path]) -> Plan:
        """Check a search file wholly, as `evomerge validate` does.

        Raises:
            InputError: what is wrong with it.
            ProblemError: it took too long, or the process died of it.
        """
        return Plan.model_validate(self._ask("plan", text=text, folders=[str(folder) for folder in folders]))

    def create(self, text: str, folders: Sequence[Path]) -> str:
        """Check a search file and make the folder and store of its search; its name. Raises like ``plan``."""
        found = self._ask("create", text=text, folders=[str(f) for f in folders], root=str(self._root.folder))
        return str(found["name"])

    def inspect(self, sources: Mapping[str, str], base: str | None) -> dict[str, Any]:
        """What models are and how close they are: an ``Inspection``. Raises like ``plan``."""
        return self._ask("inspect", sources=dict(sources), base=base)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ask(self, what: str, **more: Any) -> dict[str, Any]:
        with self._turn:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            answers: queue.Queue[str] = queue.Queue()
            output = process.stdout
            threading.Thread(target=lambda: answers.put(output.readline()), daemon=True).start()
            try:
                process.stdin.write(json.dumps({"what": what, **more}) + "\n")
                process.stdin.flush()
                line = answers.get(timeout=MOST_S)
            except (queue.Empty, BrokenPipeError):
                line = ""
            if not line:
                self.close()
                detail = f"It took more than {MOST_S:.0f} s, or more memory than there is. See the server's output."
                raise ProblemError(503, "The check did not come to an end", detail=detail)
        answer: dict[str, Any] = json.loads(line)
        if "fault" in answer:
            raise InputError(*answer["fault"])
        if "broken" in answer:
            raise ProblemError(500, "The check failed", detail=answer["broken"])
        found: dict[str, Any] = answer["found"]
        return found

    def _start(self) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
        if self._root.database is not None:
            environment[STORE_VARIABLE] = self._root.database
        self._root.folder.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", "evomerge.service.checking"], cwd=self._root.folder, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True,
        )  # fmt: skip


def _plan(text: str, folders: Sequence[str]) -> dict[str, Any]:
    prepared = _prepared(text, folders)
    from evomerge.report.plan import plan

    table = plan(prepared)
    keys, texts = ([str(cell) for cell in column.cells] for column in table.columns)
    rows = [PlanRow(key=key, text=told) for key, told in zip(keys, texts, strict=True)]
    return Plan(name=prepared.file.name, rows=rows).model_dump()


def _create(text: str, folders: Sequence[str], root: str) -> dict[str, Any]:
    prepared = _prepared(text, folders)
    from evomerge.search.session import create_search

    create_search(Path(root) / prepared.file.name, prepared).close()
    return {"name": prepared.file.name}


def _prepared(text: str, folders: Sequence[str]) -> Any:
    from evomerge.checkpoints.checks import check_finite
    from evomerge.search.prepare import prepare
    from evomerge.search.worker import choose_device
    from evomerge.service.allowed import checked_file

    prepared = prepare(checked_file(text, [Path(folder) for folder in folders]))
    if prepared.file.pool == "in_process":
        choose_device(prepared.file.device)
    for source in prepared.sources.values():
        check_finite(source)
    return prepared


def _inspect(sources: Mapping[str, str], base: str | None) -> dict[str, Any]:
    from evomerge.report.inspection import inspect_models

    references = list(dict.fromkeys(sources.values()))
    return inspect_models(references, base).model_dump(mode="json")


_QUESTIONS: Mapping[str, Callable[..., dict[str, Any]]] = {"plan": _plan, "create": _create, "inspect": _inspect}


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"found": _QUESTIONS[question.pop("what")](**question)}
    except InputError as error:
        return {"fault": [error.place, error.problem, error.mend]}
    except Exception as error:  # whatever a model or a data set brings about is said to whoever named it
        return {"broken": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer questions until there are no more. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
