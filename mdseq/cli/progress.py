"""How far a command is, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, done: int, total: int, beside_text: bool) -> Iterator[Callable[[], None]]:
    """A bar; its function is called each time another is done.

    Args:
        what: Title of the bar.
        done: How many are done from the start.
        total: How many there are.
        beside_text: Whether the command prints its results: a bar among them would be in the way on a terminal.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    hidden = not console.is_terminal or (beside_text and sys.stdout.isatty())
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda: bar.advance(task)
