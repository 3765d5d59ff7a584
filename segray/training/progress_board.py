"""Show training progress on the terminal: rank 0 posts to a small actor, and a thread of the driver polls it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import Progress

from segray.progress import build_bar
from segray.training.watchdog import StallDetector

_POST_INTERVAL_S = 0.5
_POLL_INTERVAL_S = 0.5
_NOTE_AT_START = "starting workers"


TrackEpochs = Callable[[list[dict[str, Any]]], bool]
TrackSteps = Callable[[list[dict[str, Any]]], None]


class ProgressBoard:
    """Actor that passes progress from the ranks to the driver, and permission to continue from the driver to the ranks.

    Rank 0 posts steps, lines and metrics, and every rank reports its step and stage for stall detection.

    Args:
        stall_timeout_s: A run has stalled if no rank has made progress for this long.
    """

    def __init__(self, stall_timeout_s: float) -> None:
        self._state: dict[str, Any] = {"step": 0, "note": ""}
        self._lines: list[str] = []
        self._epochs: dict[int, dict[str, Any]] = {}
        self._steps: list[dict[str, Any]] = []
        self._allowed = (0, True)
        self._detector = StallDetector(stall_timeout_s)

    def post(self, step: int, note: str) -> None:
        """Set the number of completed steps, and the note beside the bar."""
        self._state = {"step": step, "note": note}

    def post_line(self, line: str) -> None:
        """Add a line to print above the bar."""
        self._lines.append(line)

    def post_epochs(self, history: list[dict[str, Any]]) -> None:
        """Add the metrics of epochs; epochs that a restarted run repeats have the same metrics and are ignored."""
        for metrics in history:
            self._epochs.setdefault(metrics["epoch"], metrics)

    def post_step(self, row: dict[str, Any]) -> None:
        """Add a row of ``steps.csv``."""
        self._steps.append(row)

    def fetch(
        self, num_seen_lines: int, num_seen_epochs: int
    ) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
        """Return the state, and the lines and epochs that the caller has not seen yet."""
        return self._state, self._lines[num_seen_lines:], list(self._epochs.values())[num_seen_epochs:]

    def take_steps(self) -> list[dict[str, Any]]:
        """Return the rows of ``steps.csv`` since the last call; they are not kept, as there can be millions."""
        rows, self._steps = self._steps, []
        return rows

    def allow_epoch(self, epoch: int, may_continue: bool) -> None:
        """Record whether training may continue after ``epoch``, and that all epochs up to it were processed."""
        self._allowed = (epoch, may_continue)

    def may_continue(self, epoch: int) -> bool | None:
        """Return whether training may continue after ``epoch``; None while the driver has not decided."""
        last_epoch, may_continue = self._allowed
        return may_continue if last_epoch >= epoch else None

    def restart(self, num_ranks: int) -> str | None:
        """Register new ranks; return the diagnosis if the run has stalled, in which case they must not start."""
        self._detector.restart(num_ranks)
        return self._detector.diagnosis

    def record(self, rank: int, step: int, stage: str, num_updates: int) -> str | None:
        """Record the report of a rank; return the diagnosis if the run has stalled."""
        return self._detector.record(rank, step, stage, num_updates)

    def get_diagnosis(self) -> str | None:
        """Return the error message if the run has stalled, else None."""
        return self._detector.diagnosis


class ProgressPoster:
    """Posts the progress of rank 0 to the board, at most twice a second and without waiting for an answer.

    Args:
        board: Handle of the ``ProgressBoard`` actor.
    """

    def __init__(self, board: Any) -> None:
        self._board = board
        self._last_post_s = 0.0

    def post(self, step: int, note: str) -> None:
        """Post the number of completed steps and a note, unless the last post was less than half a second ago."""
        now_s = time.monotonic()
        if now_s - self._last_post_s >= _POST_INTERVAL_S:
            self._last_post_s = now_s
            self._board.post.remote(step, note)

    def post_line(self, line: str) -> None:
        """Post a line that stays on the screen."""
        self._board.post_line.remote(line)

    def post_step(self, row: dict[str, Any]) -> None:
        """Post a row of ``steps.csv``."""
        self._board.post_step.remote(row)

    def post_epochs(self, history: list[dict[str, Any]]) -> None:
        """Post the metrics of epochs, for the trackers."""
        self._board.post_epochs.remote(history)


class _Display:
    """Shows new posts of the board beside the progress bar, and passes new metrics on."""

    def __init__(self, board: Any, bar: Progress, num_steps: int, track: TrackEpochs, track_steps: TrackSteps) -> None:
        self._board = board
        self._bar = bar
        self._task = bar.add_task("train", total=num_steps, note=_NOTE_AT_START)
        self._track, self._track_steps = track, track_steps
        self._num_seen_lines = 0
        self._num_seen_epochs = 0

    def refresh(self) -> None:
        """Fetch and show what is new, and pass the decision of ``track`` to the board."""
        try:
            fetched = ray.get(self._board.fetch.remote(self._num_seen_lines, self._num_seen_epochs))
            rows = ray.get(self._board.take_steps.remote())
        except RayError:  # A failure of the display must not end the run.
            return
        state, lines, epochs = fetched
        self._num_seen_lines += len(lines)
        self._num_seen_epochs += len(epochs)
        for line in lines:
            self._bar.console.print(line, highlight=False)
        self._bar.update(self._task, completed=state["step"], note=state["note"] or _NOTE_AT_START)
        if rows:
            self._track_steps(rows)
        if epochs:
            self._board.allow_epoch.remote(epochs[-1]["epoch"], self._track(epochs))

    def refresh_until(self, stop: threading.Event) -> None:
        """Refresh twice a second until the event is set."""
        while not stop.wait(_POLL_INTERVAL_S):
            self.refresh()


@contextmanager
def show_training(
    console: Console, num_steps: int, stall_timeout_s: float, track: TrackEpochs, track_steps: TrackSteps
) -> Iterator[Any]:
    """Show the progress of a training run while the block runs; yields the handle of its ``ProgressBoard``.

    Args:
        console: Where progress is shown.
        num_steps: Training steps of the whole run.
        stall_timeout_s: A run has stalled if no rank has made progress for this long.
        track: Called from a thread with the metrics of new epochs; returns whether training may continue.
        track_steps: Called from the same thread with new rows of ``steps.csv``.
    """
    # Pinned to the driver's node: an actor without CPUs may be placed on any node, including one that is removed later.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressBoard).remote(stall_timeout_s)
    stop = threading.Event()
    with build_bar(console, "steps") as bar:
        display = _Display(board, bar, num_steps, track, track_steps)
        thread = threading.Thread(target=display.refresh_until, args=(stop,), daemon=True)
        thread.start()
        try:
            yield board
        finally:
            stop.set()
            thread.join()
            display.refresh()
            ray.kill(board)
