"""Detect stalled training: a rank that makes no progress blocks all others forever, as they wait for its gradients.

Each rank has a thread that reports the rank's step and stage to the board on the driver's node. Once no rank has made
progress for the configured time, the diagnosis names the ranks that stopped reporting or, if all still report, those
that are furthest behind. Every rank that receives it ends its process, and the workers that Ray Train starts in their
place find the diagnosis and return it.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError

STAGES = ("setting up", "evaluating", "saving", "loading", "forward", "backward", "update")  # In order within a step.
_BEATS_PER_TIMEOUT = 8
_MAX_INTERVAL_S = 5.0


class Beat(NamedTuple):
    """The last report of a rank.

    Attributes:
        step: Index of the step it is in, from 0.
        stage: Index of its stage in ``STAGES``.
        num_updates: How many times it has made progress since its process started.
        progress_s: Time at which it last made progress.
        reported_s: Time at which it last reported.
    """

    step: int
    stage: int
    num_updates: int
    progress_s: float
    reported_s: float


class StallDetector:
    """Tracks where each rank is and detects when the run has stalled.

    All times are read from the clock of the process that receives the reports.

    Args:
        timeout_s: A run has stalled if no rank has made progress for this long.
        clock: Returns the current time in seconds.

    Attributes:
        diagnosis: Error message if the run has stalled, else None.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._beats: dict[int, Beat] = {}
        self.diagnosis: str | None = None

    def restart(self, num_ranks: int) -> None:
        """Replace all ranks with new ones, whose time without progress starts now."""
        now_s = self._clock()
        self._beats = {rank: Beat(0, 0, 0, now_s, now_s) for rank in range(num_ranks)}

    def record(self, rank: int, step: int, stage: str, num_updates: int) -> str | None:
        """Record the report of a rank; return the diagnosis if the run has stalled."""
        now_s = self._clock()
        last = self._beats.get(rank)
        if last and num_updates < last.num_updates:  # A new process: Ray Train replaces all ranks together.
            self.restart(len(self._beats))
            last = None
        progress_s = last.progress_s if last and last.num_updates == num_updates else now_s
        self._beats[rank] = Beat(step, STAGES.index(stage), num_updates, progress_s, now_s)
        # Only checked when a rank reports: while none does, Ray Train may be replacing workers that died.
        if self.diagnosis is None and all(now_s - beat.progress_s >= self._timeout_s for beat in self._beats.values()):
            self.diagnosis = self._diagnose(now_s)
        return self.diagnosis

    def _diagnose(self, now_s: float) -> str:
        silent_s = self._timeout_s / 2
        stalled = [rank for rank, beat in self._beats.items() if now_s - beat.reported_s > silent_s]
        if not stalled:
            least = min(beat[:2] for beat in self._beats.values())
            stalled = [rank for rank, beat in self._beats.items() if beat[:2] == least]
        named = "; ".join(f"rank {rank} in {self._describe(self._beats[rank])}" for rank in sorted(stalled))
        return (
            f"training made no progress for {self._timeout_s:g} s (train.stall_timeout_s); stalled: {named}; to resume "
            "from the newest checkpoint, rerun the same command"
        )

    @staticmethod
    def _describe(beat: Beat) -> str:
        return f"step {beat.step + 1} ({STAGES[beat.stage]})"


class Heartbeat:
    """A thread that reports a rank's step and stage, and ends the rank's process if the run has stalled.

    Args:
        board: Handle of the ``ProgressBoard`` actor.
        rank: World rank.
        timeout_s: The stall timeout; reports are sent several times within it.
    """

    def __init__(self, board: Any, rank: int, timeout_s: float) -> None:
        self._board = board
        self._rank = rank
        self._position = (0, STAGES[0], 0)  # Replaced as a whole, so that the thread never reads half an update.
        self._interval_s = min(timeout_s / _BEATS_PER_TIMEOUT, _MAX_INTERVAL_S)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Start reporting."""
        self._thread.start()

    def stop(self) -> None:
        """Stop reporting."""
        self._stop.set()

    def update(self, step: int, stage: str) -> None:
        """Record that the rank has made progress.

        Args:
            step: Index of the step it is in, from 0.
            stage: One of ``STAGES``.
        """
        self._position = (step, stage, self._position[2] + 1)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                diagnosis = ray.get(self._board.record.remote(self._rank, *self._position), timeout=self._interval_s)
            except RayError:  # A board that is lost or slow must not end a run that makes progress.
                continue
            if diagnosis:
                os._exit(1)  # The main thread waits in a collective operation, which an exception cannot interrupt.
