"""Consoles and progress bars, shared by all commands.

Without a terminal (a pipe, a job log) the output holds no escape sequences. On a terminal, ``NO_COLOR`` turns colours
off.
"""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LOG_WIDTH = 120


def build_bar(console: Console, unit: str) -> Progress:
    """Build a progress bar that counts in ``unit``; without a terminal it draws nothing.

    Lines printed to ``bar.console`` appear above the bar, or as plain lines without a terminal. Each task needs the
    field ``note``, which is shown after the unit.
    """
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
    """Build the console that commands print to; without a terminal, lines are plain text and are not wrapped."""
    if sys.stdout.isatty():
        return Console(markup=False)  # Paths may contain square brackets, which rich would read as markup.
    # Not left to rich, which would print escape sequences into a pipe if FORCE_COLOR or TTY_COMPATIBLE is set.
    return Console(markup=False, width=_LOG_WIDTH, soft_wrap=True, force_terminal=False)


def build_quiet_console() -> Console:
    """Build a console that prints nothing, for use from Python."""
    return Console(quiet=True, markup=False, force_terminal=False)
