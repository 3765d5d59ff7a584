"""Consoles and progress bars: no escape sequences without a terminal, no colours with NO_COLOR."""

import os
import pty
import re
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from rich.table import Table
from segray import progress

console = getattr(progress, sys.argv[1])()
with console.status("listing images") as status:
    status.update("listing images: 5")
console.print("s3://bucket/[red]a.png has 12 'errors'")
console.print("bold", style="bold green")
console.print("x" * 200)
table = Table("class", "IoU")
table.add_row("road", "0.5")
console.print(table)
with progress.build_bar(console, "images") as bar:
    task = bar.add_task("segment", total=2, note="1 error")
    bar.advance(task)
    bar.console.print("warning: 1 error")
    bar.refresh()
"""
COLOUR = re.compile(r"\x1b\[[\d;]*?\b(3[0-8]|4[0-8]|9\d|10[0-7])(;[\d;]*)?m")
VARIABLES = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS")


def build_environment(**variables: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return {**own, "TERM": "xterm-256color", **variables}


def run_in_pipe(console: str, **variables: str) -> str:
    command = [sys.executable, "-c", PROGRAM, console]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=build_environment(**variables)
    ).stdout


def run_in_terminal(console: str, **variables: str) -> str:
    """Run the program with a pseudo-terminal as its output, and return all that it wrote there."""
    terminal, output = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, console]
    process = subprocess.Popen(command, stdout=output, env=build_environment(**variables))
    os.close(output)
    content = b""
    try:
        while chunk := os.read(terminal, 65_536):
            content += chunk
    except OSError:  # Linux reports the closed end of a pseudo-terminal as EIO.
        pass
    finally:
        os.close(terminal)
    assert process.wait() == 0
    return content.decode()


@pytest.mark.parametrize("variable", [None, "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_a_pipe_receives_plain_unwrapped_lines(variable: str | None) -> None:
    written = run_in_pipe("build_console", **({variable: "1"} if variable else {}))
    assert "\x1b" not in written
    assert "\r" not in written
    lines = written.splitlines()
    assert lines[:3] == ["s3://bucket/[red]a.png has 12 'errors'", "bold", "x" * 200]
    assert lines[-1] == "warning: 1 error"  # A bar leaves nothing behind.
    assert "listing images" not in written


def test_a_terminal_receives_colours_and_a_bar_unless_no_color_is_set() -> None:
    coloured, plain = run_in_terminal("build_console"), run_in_terminal("build_console", NO_COLOR="1")
    assert COLOUR.search(coloured)
    assert not COLOUR.search(plain)
    for written in (coloured, plain):
        assert "listing images" in written
        assert "1/2" in written


def test_a_quiet_console_prints_nothing() -> None:
    assert run_in_pipe("build_quiet_console", FORCE_COLOR="1") == ""
    assert run_in_terminal("build_quiet_console") == ""
