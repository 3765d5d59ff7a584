"""Progress from the workers to the terminal: rank 0 posts to a small actor, and a thread of the driver shows it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from segray.progress import build_bar
from segray.training.watchdog import StallJudge

_POST_INTERVAL_S = 0.5
_POLL_INTERVAL_S = 0.5


class ProgressBoard:
    """Where rank 0 leaves what it has done, for the driver to fetch, and all ranks where they are."""

    def __init__(self, stall_timeout_s: float) -> None:
        self._state: dict[str, Any] = {"step": 0, "note": ""}
        self._lines: list[str] = []
        self._epochs: dict[int, dict[str, Any]] = {}
        self._leave = (0, True)
        self._judge = StallJudge(stall_timeout_s)

    def post(self, step: int, note: str) -> None:
        """Set the step and the note beside the bar."""
        self._state = {"step": step, "note": note}

    def post_line(self, line: str) -> None:
        """Add a line to be printed above the bar."""
        self._lines.append(line)

    def post_epochs(self, history: list[dict[str, Any]]) -> None:
        """Add the metrics of epochs; those that a restarted run went through again are the same."""
        for metrics in history:
            self._epochs.setdefault(metrics["epoch"], metrics)

    def fetch(
        self, num_seen_lines: int, num_seen_epochs: int
    ) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
        """Return the state, and the lines and epochs after those already seen."""
        return self._state, self._lines[num_seen_lines:], list(self._epochs.values())[num_seen_epochs:]

    def give_leave(self, epoch: int, goes_on: bool) -> None:
        """Note that epochs up to this one were looked at, and whether training goes on after it."""
        self._leave = (epoch, goes_on)

    def has_leave(self, epoch: int) -> bool | None:
        """Return whether training goes on after an epoch; None while that is not known."""
        looked_at, goes_on = self._leave
        return goes_on if looked_at >= epoch else None

    def restart(self, num_ranks: int) -> str | None:
        """Begin with new ranks; return why they should not begin, if the run has stalled."""
        self._judge.restart(num_ranks)
        return self._judge.verdict

    def hear(self, rank: int, step: int, stage: str, num_moves: int) -> str | None:
        """Take note of where a rank is; return the verdict if the run has stalled."""
        return self._judge.hear(rank, step, stage, num_moves)

    def get_verdict(self) -> str | None:
        """Return why the run has stalled, if it has."""
        return self._judge.verdict


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

    def post_epochs(self, history: list[dict[str, Any]]) -> None:
        """Post the metrics of epochs, for those who track them."""
        self._board.post_epochs.remote(history)


@contextmanager
def show_training(
    console: Console, num_steps: int, stall_timeout_s: float, track: Callable[[list[dict[str, Any]]], bool]
) -> Iterator[Any]:
    """Show the progress of a training run while the block runs; gives the board that the ranks post to.

    Args:
        console: Where it is shown.
        num_steps: Of the whole run.
        stall_timeout_s: After how long without a move a run has stalled.
        track: Called with the metrics of epochs that are new, from a thread; returns whether training goes on.
    """
    # on the driver's own node: an actor without CPUs may be put anywhere, also on a node that is taken away
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressBoard).remote(stall_timeout_s)
    stop = threading.Event()
    with build_bar(console, "steps") as bar:
        task = bar.add_task("train", total=num_steps, note="starting workers")
        num_seen_lines = num_seen_epochs = 0

        def show_once() -> None:
            nonlocal num_seen_lines, num_seen_epochs
            try:
                state, lines, epochs = ray.get(board.fetch.remote(num_seen_lines, num_seen_epochs))
            except RayError:  # a display that fails must not end a run that does not
                return
            num_seen_lines += len(lines)
            num_seen_epochs += len(epochs)
            for line in lines:
                bar.console.print(line, highlight=False)
            bar.update(task, completed=state["step"], note=state["note"] or "starting workers")
            if epochs:
                board.give_leave.remote(epochs[-1]["epoch"], track(epochs))

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
