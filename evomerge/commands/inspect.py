"""The command inspect: look at models before merging them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from evomerge.checkpoints.references import check_reference
from evomerge.report.consoles import make_console


def inspect(models: Sequence[str], base: str | None, *, as_json: bool) -> None:
    """Print what models are and how close they are. Checks that they exist before it imports torch."""
    for model in (*models, *([base] if base is not None else [])):
        check_reference(model, model)
    from evomerge.report.closeness import shown
    from evomerge.report.inspection import inspect_models

    screen = Console(stderr=True)  # a program may be reading stdout
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("comparing weights", total=None)
        inspection = inspect_models(models, base, lambda done, of: bar.update(task, completed=done, total=of))
    if as_json:
        print(inspection.model_dump_json(indent=2))
        return
    console = make_console()
    console.print(shown(inspection, console.width))
    if base is None and inspection.base is not None:
        console.print(f"\nThe base is {inspection.base}, because it was named first; --base names another.")
