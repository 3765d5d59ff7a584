"""Stalls: a rank that does not move holds up all others for ever, as each waits for its gradients.

Every rank says where it is, from a thread of its own, to the board on the driver's node. When no rank has moved for the
set time, those that have come least far, or that say nothing any more, are named, every rank that hears of it ends its
process, and the workers that Ray Train then starts find the verdict and return it.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError

STAGES = ("setting up", "evaluating", "saving", "loading", "forward", "backward", "update")  # in a step's own order
_BEATS_PER_TIMEOUT = 8
_MAX_INTERVAL_S = 5.0


class Beat(NamedTuple):
    """Where a rank is: its step and stage (a place in ``STAGES``), how often it moved, when last, when last heard."""

    step: int
    stage: int
    num_moves: int
    moved_s: float
    heard_s: float


class StallJudge:
    """Knows where each rank is, and says when the run has stalled. Times are of one clock, the judge's."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._beats: dict[int, Beat] = {}
        self.verdict: str | None = None

    def restart(self, num_ranks: int) -> None:
        """Forget the ranks: there are new ones."""
        now_s = self._clock()
        self._beats = {rank: Beat(0, 0, 0, now_s, now_s) for rank in range(num_ranks)}

    def hear(self, rank: int, step: int, stage: str, num_moves: int) -> str | None:
        """Take note of a rank, and return the verdict if the run has stalled."""
        now_s = self._clock()
        last = self._beats.get(rank)
        if last and num_moves < last.num_moves:  # of a new process; with it all ranks are new
            self.restart(len(self._beats))
            last = None
        moved_s = last.moved_s if last and last.num_moves == num_moves else now_s
        self._beats[rank] = Beat(step, STAGES.index(stage), num_moves, moved_s, now_s)
        # only when a rank speaks: where none does, workers may be on their way that replace those that died
        if self.verdict is None and all(now_s - beat.moved_s >= self._timeout_s for beat in self._beats.values()):
            self.verdict = self._name_stalled(now_s)
        return self.verdict

    def _name_stalled(self, now_s: float) -> str:
        silent_s = self._timeout_s / 2
        stalled = [rank for rank, beat in self._beats.items() if now_s - beat.heard_s > silent_s]
        if not stalled:
            least = min(beat[:2] for beat in self._beats.values())
            stalled = [rank for rank, beat in self._beats.items() if beat[:2] == least]
        named = "; ".join(f"rank {rank} in {self._describe(self._beats[rank])}" for rank in sorted(stalled))
        return (
            f"training has not moved for {self._timeout_s:g} s (train.stall_timeout_s); stalled: {named}. "
            "The same command goes on from the newest checkpoint"
        )

    @staticmethod
    def _describe(beat: Beat) -> str:
        return f"step {beat.step + 1} ({STAGES[beat.stage]})"


class Heartbeat:
    """A rank's end: tells the board from a thread where the rank is, and ends the process on a verdict."""

    def __init__(self, board: Any, rank: int, timeout_s: float) -> None:
        self._board = board
        self._rank = rank
        self._place = (0, STAGES[0], 0)  # replaced as a whole, so that the thread never reads half of a move
        self._interval_s = min(timeout_s / _BEATS_PER_TIMEOUT, _MAX_INTERVAL_S)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def stop(self) -> None:
        """Tell no more."""
        self._stop.set()

    def move(self, step: int, stage: str) -> None:
        """Note where the rank is now."""
        self._place = (step, stage, self._place[2] + 1)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                verdict = ray.get(self._board.hear.remote(self._rank, *self._place), timeout=self._interval_s)
            except RayError:  # a board that is lost, or slow, must not end a run that moves
                continue
            if verdict:
                os._exit(1)  # this rank's own thread waits in a collective that no exception gets into
