"""The only exception for invalid input that the user can fix, and one line about any exception."""

from __future__ import annotations

import re

from evomerge.printable import fitted, printable

_LINK = re.compile(r"For further information visit \S+")
"""What pydantic adds to each fault."""


class InputError(Exception):
    """Something that the user provided is wrong: a file, a value, a model folder, a flag.

    The command line prints it without a traceback and exits with code 2, so the message must be self-contained: it
    names the place (``sources.maths``, ``search.yaml: budget.candidates``, a path), says what is wrong there, and what
    to do. Foreign text in it is made printable here, and long text is shortened (``printable``).

    Args:
        place: where the error is, in the terms of the input's author.
        problem: what is wrong, as a clause: "has no config.json".
        hint: what to do about it, as a sentence; empty if the problem already says it.
    """

    def __init__(self, place: str, problem: str, hint: str = "") -> None:
        self.place, self.problem, self.hint = fitted([place, problem, hint])
        end = "" if self.problem.endswith(".") else "."  # the problem may be another error's message that ends in one
        super().__init__(f"{self.place}: {self.problem}" + (f"{end} {self.hint}" if self.hint else ""))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str]]:
        # Ray pickles exceptions of workers; by default __init__ would be called with only the joined message.
        return type(self), (self.place, self.problem, self.hint)


def described(error: BaseException) -> str:
    """An exception as one line: an InputError as it is, any other with the name of its type."""
    if isinstance(error, InputError):
        return str(error)
    text = " ".join(_LINK.sub("", str(error)).split())
    return printable(f"{type(error).__name__}: {text}".removesuffix(": "))
