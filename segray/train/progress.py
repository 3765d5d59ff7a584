"""Progress from the workers to the terminal: rank 0 posts to a small actor, and a thread of the driver shows it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from segray.progress import build_bar

_POST_INTERVAL_S = 0.5
_POLL_INTERVAL_S = 0.5


class ProgressBoard:
    """Where rank 0 leaves what it has done, for the driver to fetch."""

    def __init__(self) -> None:
        self._state: dict[str, Any] = {"step": 0, "note": ""}
        self._lines: list[str] = []

    def post(self, step: int, note: str) -> None:
        """Set the step and the note beside the bar."""
        self._state = {"step": step, "note": note}

    def post_line(self, line: str) -> None:
        """Add a line to be printed above the bar."""
        self._lines.append(line)

    def fetch(self, num_seen_lines: int) -> tuple[dict[str, Any], list[str]]:
        """Return the state, and the lines after those already seen."""
        return self._state, self._lines[num_seen_lines:]


class ProgressPoster:
    """Rank 0's end: posts at most twice a second, and never waits for an answer."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._last_post_s = 0.0

    def post(self, step: int, note: str) -> None:
        """Post where the run is, unless the last post was a moment ago."""
        now_s = time.monotonic()
        if now_s - self._last_post_s >= _POST_INTERVAL_S:
            self._last_post_s = now_s
            self._board.post.remote(step, note)

    def post_line(self, line: str) -> None:
        """Post a line that stays on the screen."""
        self._board.post_line.remote(line)


@contextmanager
def show_training(console: Console, num_steps: int) -> Iterator[Any]:
    """Show the progress of a training run while the block runs; gives the board that rank 0 posts to."""
    # on the driver's own node: an actor without CPUs may be put anywhere, also on a node that is taken away
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressBoard).remote()
    stop = threading.Event()
    with build_bar(console, "steps") as bar:
        task = bar.add_task("train", total=num_steps, note="starting workers")
        num_seen_lines = 0

        def show_once() -> None:
            nonlocal num_seen_lines
            try:
                state, lines = ray.get(board.fetch.remote(num_seen_lines))
            except RayError:  # a display that fails must not end a run that does not
                return
            num_seen_lines += len(lines)
            for line in lines:
                bar.console.print(line, highlight=False)
            bar.update(task, completed=state["step"], note=state["note"] or "starting workers")

        def show_until_stopped() -> None:
            while not stop.wait(_POLL_INTERVAL_S):
                show_once()

        thread = threading.Thread(target=show_until_stopped, daemon=True)
        thread.start()
        try:
            yield board
        finally:
            stop.set()
            thread.join()
            show_once()
            ray.kill(board)
