"""The progress display that all verbs share."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LOG_WIDTH = 120


def build_bar(console: Console, unit: str) -> Progress:
    """Return segray's progress display; on a terminal a bar, elsewhere nothing but the lines printed above it."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def build_console() -> Console:
    """Build the console that verbs print to; where nobody watches, lines are not wrapped and no bar is drawn."""
    if sys.stdout.isatty():
        return Console(markup=False)  # a path may hold what looks like markup
    return Console(markup=False, width=_LOG_WIDTH, soft_wrap=True)
