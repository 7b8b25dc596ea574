"""Checking search files and inspecting models in a separate process, ``python -m evomerge.service.checking``.

The code that opens models takes seconds to import and gigabytes of memory, and a file that crashes it must not bring
down the server. So there is one long-lived process that reads one question per line and writes one answer per line. It
ends with the server, and is killed if an answer takes too long.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import InputError, described
from evomerge.search.settings.folder import STORE_VARIABLE
from evomerge.service.bodies import Plan, PlanPrompt, PlanRow
from evomerge.service.problems import ProblemError
from evomerge.service.processes import TOKEN_VARIABLE
from evomerge.service.root import Root
from evomerge.startup import collect_garbage_rarely
from evomerge.store.columns import parse_json

MAX_S = 300.0
"""The timeout of an answer. A model that must first be downloaded from the hub may take longer: the next attempt
continues the download."""

WAIT_S = 60.0
"""How long a question may wait in the queue."""

MAX_WAITING = 4
"""The length of the queue; further questions are refused."""

ABANDONED_S = 5.0
"""How long an abandoned question may continue, because killing the process makes the next one repeat the imports."""

_LONGEST_ANSWER = 2**26  # bytes; the answer about 16 models of 100 layers has a few million


class Checker:
    """Sends questions to the checking process one at a time, and starts it when first needed.

    All waiting happens in the event loop, so a slow check never occupies a thread of the service.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._process: asyncio.subprocess.Process | None = None

    async def plan(self, text: str, folders: Sequence[Path]) -> Plan:
        """Check a search file completely, as `evomerge validate` does.

        Raises:
            InputError: the file is invalid.
            ProblemError: too many checks are waiting, the check timed out, or the process died.
        """
        return Plan.model_validate(await self._ask("plan", text=text, folders=[str(folder) for folder in folders]))

    async def create(self, text: str, folders: Sequence[Path]) -> str:
        """Check a search file, create the folder and store of its search, and return its name. Raises like ``plan``."""
        created = await self._ask("create", text=text, folders=[str(f) for f in folders], root=str(self._root.folder))
        return str(created["name"])

    async def inspect(self, sources: Mapping[str, str], base: str | None) -> dict[str, Any]:
        """Describe models and how close they are to each other, as an ``Inspection``. Raises like ``plan``."""
        return await self._ask("inspect", sources=dict(sources), base=base)

    async def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        self._process = None

    async def _ask(self, what: str, **more: Any) -> dict[str, Any]:
        await self._take_turn()
        answering = asyncio.create_task(self._answer_in_turn({"what": what, **more}))
        try:
            line = await asyncio.shield(answering)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(ABANDONED_S, answering.cancel)
            raise
        if not line:
            detail = f"It took more than {MAX_S:.0f} s, or more memory than there is. See the server's output."
            raise ProblemError(503, "The check did not finish", detail=detail)
        answer: dict[str, Any] = parse_json(line.decode())
        if "fault" in answer:
            raise InputError(*answer["fault"])
        if "broken" in answer:
            raise ProblemError(500, "The check failed", detail=answer["broken"])
        result: dict[str, Any] = answer["found"]
        return result

    async def _take_turn(self) -> None:
        """Wait until the process is free."""
        if self._waiting >= MAX_WAITING:
            raise ProblemError(503, "Too many checks are waiting", detail="Try again in a minute.")
        self._waiting += 1
        try:
            async with asyncio.timeout(WAIT_S):
                await self._turn.acquire()
        except TimeoutError:
            detail = f"It waited {WAIT_S:.0f} s for another check, which is still running. Try again in a minute."
            raise ProblemError(503, "The check did not start", detail=detail) from None
        finally:
            self._waiting -= 1

    async def _answer_in_turn(self, question: Mapping[str, Any]) -> bytes:
        """The answer to a question as a line of JSON, or nothing if it failed; then release the turn."""
        line = b""
        try:
            async with asyncio.timeout(MAX_S):
                line = await self._exchange(json.dumps(question))
        except (TimeoutError, OSError, ValueError):  # timed out, the process died, or the line is too long
            pass
        finally:
            if not line:
                await self.close()
            self._turn.release()
        return line

    async def _exchange(self, question: str) -> bytes:
        """Send a question to the process and return its answer, or nothing if the process ends."""
        if self._process is None or self._process.returncode is not None:
            self._process = await self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{question}\n".encode())
        await process.stdin.drain()
        return await process.stdout.readline()

    async def _start(self) -> asyncio.subprocess.Process:
        environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
        if self._root.database is not None:
            environment[STORE_VARIABLE] = self._root.database
        self._root.folder.mkdir(parents=True, exist_ok=True)
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "evomerge.service.checking"), cwd=self._root.folder, env=environment,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
            limit=_LONGEST_ANSWER,
        )  # fmt: skip


def _plan(text: str, folders: Sequence[str]) -> dict[str, Any]:
    prepared = _prepared(text, folders)
    from evomerge.report.plan import expected, plan_rows
    from evomerge.report.prompts import token_text
    from evomerge.search.preparing.asking import shown_prompts

    rows = [PlanRow(key=key, text=value) for key, value in plan_rows(prepared)]
    prompts = [
        PlanPrompt(place=s.place, item=s.item, prompt=s.prompt, answer=s.answer, tokens=token_text(s))
        for s in shown_prompts(prepared.named_evaluators, prepared.reader())
    ]
    return Plan(name=prepared.file.name, rows=rows, outlook=expected(prepared), prompts=prompts).model_dump()


def _create(text: str, folders: Sequence[str], root: str) -> dict[str, Any]:
    prepared = _prepared(text, folders)
    from evomerge.search.opening.session import create_search, fingerprints_of

    create_search(Path(root) / prepared.file.name, prepared, fingerprints_of(prepared)).close()
    return {"name": prepared.file.name}


def _prepared(text: str, folders: Sequence[str]) -> Any:
    from evomerge.search.settings.early import check_early
    from evomerge.service.allowed import checked_file

    file = checked_file(text, [Path(folder) for folder in folders])
    check_early(file)
    from evomerge.checkpoints.checks import check_finite
    from evomerge.report.fit import check_fit
    from evomerge.search.opening.start import with_start
    from evomerge.search.preparing.prepare import prepare
    from evomerge.search.workers.building import check_devices

    prepared = with_start(prepare(file))
    check_devices(prepared.file)
    check_fit(prepared)
    for source in prepared.sources.values():
        check_finite(source)
    return prepared


def _inspect(sources: Mapping[str, str], base: str | None) -> dict[str, Any]:
    from evomerge.report.inspection import inspect_models

    called = {reference: name for name, reference in sources.items()}
    return inspect_models(list(called), base, called=called).model_dump(mode="json")


_QUESTIONS: Mapping[str, Callable[..., dict[str, Any]]] = {"plan": _plan, "create": _create, "inspect": _inspect}


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"found": _QUESTIONS[question.pop("what")](**question)}
    except InputError as error:
        return {"fault": [error.place, error.problem, error.hint]}
    except Exception as error:  # whatever a model or data set causes is reported to the client that named it
        return {"broken": described(error)}


def main() -> None:
    """Answer questions until standard input ends. Whatever libraries print goes to standard error."""
    collect_garbage_rarely()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
