"""The one exception for input that a person can fix."""

from __future__ import annotations

from evomerge.printable import fitted


class InputError(Exception):
    """Something that a person gave is wrong: a file, a value, a model folder, a flag.

    The command line prints it without a traceback and ends with exit code 2, so the message must stand alone: it names
    the place (``sources.maths``, ``search.yaml: budget.candidates``, a path), says what is wrong there, and what to do.
    Text of others in it is made printable here, and what is too long is cut (``printable``).

    Args:
        place: where the fault is, in the words of whoever wrote the input.
        problem: what is wrong, as a clause: "has no config.json".
        hint: what to do about it, as a sentence; empty when the problem says it already.
    """

    def __init__(self, place: str, problem: str, hint: str = "") -> None:
        self.place, self.problem, self.hint = fitted([place, problem, hint])
        end = "" if self.problem.endswith(".") else "."  # the message of another error may end in one of its own
        super().__init__(f"{self.place}: {self.problem}" + (f"{end} {self.hint}" if self.hint else ""))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str]]:
        # Ray pickles exceptions of workers; the default would call __init__ with the joined message alone.
        return type(self), (self.place, self.problem, self.hint)
