"""Where a run's time went: the steps of each stage, how busy the predictors were, and what to turn.

Every fragment carries the seconds of its steps through the pipeline, and the driver adds them up. To read a clock costs
nothing beside an image, so this is always done, and shown on request.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table

_BUSY_SHARE = 0.9  # of a predictor's time: from here on, nothing but the model can make a run faster

STEPS_TYPE = pa.list_(pa.struct([("step", pa.string()), ("wall_s", pa.float64()), ("core_s", pa.float64())]))


class Step(StrEnum):
    """What the stages spend their time on, in the order in which an image meets it."""

    FETCH = "fetch"
    DECODE = "decode"  # and resize
    PACK = "pack"  # for the way to a predictor
    WAIT = "wait"  # of a predictor, for decoded images; its start is not counted
    PREDICT = "predict"  # the model
    COUNT = "count"  # masks and statistics from logits
    ENCODE = "encode"
    WRITE = "write"


_STAGES = {
    "decode": (Step.FETCH, Step.DECODE, Step.PACK),
    "predict": (Step.WAIT, Step.PREDICT, Step.COUNT),
    "write": (Step.ENCODE, Step.WRITE),
}
_REMEDIES = {
    Step.FETCH: "the store answers slowly: raise segment.num_fetch_threads",
    Step.DECODE: "decoding: give the cluster more CPUs beside the predictors, store JPEG instead of PNG, or decode "
    "large JPEG at a fraction of their size (segment.reduce_jpeg)",
    Step.PACK: "memory: lower segment.fragment_size",
    Step.ENCODE: "encoding: give the cluster more CPUs; segment.mask_encoding raw is faster than png",
    Step.WRITE: "the store takes fragments slowly: raise segment.fragment_size, so that they are fewer",
}


class Stopwatch:
    """Adds up the seconds of one fragment's steps; many threads may use it at once.

    Args:
        read_core_s: Clock of the processor's time: of the thread alone, or of the whole process where the step has
            threads of its own.
    """

    def __init__(self, read_core_s: Callable[[], float] = time.thread_time) -> None:
        self._read_core_s = read_core_s
        self._seconds: dict[Step, list[float]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, step: Step) -> Iterator[None]:
        """Add the time of a block to a step."""
        wall_s, core_s = time.perf_counter(), self._read_core_s()
        try:
            yield
        finally:
            self.add(step, time.perf_counter() - wall_s, self._read_core_s() - core_s)

    def add(self, step: Step, wall_s: float, core_s: float = 0.0) -> None:
        """Add time to a step."""
        with self._lock:
            seconds = self._seconds.setdefault(step, [0.0, 0.0])
            seconds[0] += wall_s
            seconds[1] += core_s

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the steps as values of ``STEPS_TYPE``."""
        return [{"step": str(step), "wall_s": wall, "core_s": core} for step, (wall, core) in self._seconds.items()]


@dataclass
class Profile:
    """Sums over the fragments of a run.

    Attributes:
        num_predictors: Predictors that there were.
        started_s: When the run began, by ``time.monotonic``.
        first_s: From there to the first written fragment; None before it.
        last_s: To the last one.
        num_first: Images in the first one.
    """

    num_predictors: int
    started_s: float
    num_images: int = 0
    num_first: int = 0
    first_s: float | None = None
    last_s: float = 0.0
    wall_s: dict[Step, float] = field(default_factory=lambda: dict.fromkeys(Step, 0.0))
    core_s: dict[Step, float] = field(default_factory=lambda: dict.fromkeys(Step, 0.0))

    def add(self, num_images: int, steps: list[dict[str, Any]]) -> None:
        """Count a fragment that was written just now."""
        self.last_s = time.monotonic() - self.started_s
        if self.first_s is None:
            self.first_s, self.num_first = self.last_s, num_images
        self.num_images += num_images
        for row in steps:
            self.wall_s[Step(row["step"])] += row["wall_s"]
            self.core_s[Step(row["step"])] += row["core_s"]

    @property
    def images_per_s(self) -> float | None:
        """Rate since the first fragment; None of fewer than two."""
        if self.first_s is None or self.last_s <= self.first_s:
            return None
        return (self.num_images - self.num_first) / (self.last_s - self.first_s)

    @property
    def busy_share(self) -> float:
        """Share of the predictors' time, their start excepted, in which they did not wait for images."""
        seconds = [self.wall_s[step] for step in _STAGES["predict"]]
        return 1 - self.wall_s[Step.WAIT] / sum(seconds) if sum(seconds) else 0.0

    def find_bottleneck(self) -> str:
        """Return what holds the run up, and what to turn."""
        if self.busy_share >= _BUSY_SHARE:
            return (
                "the model: more predictors or GPUs (segment.num_predictors, segment.num_gpus_per_predictor), "
                "segment.precision bf16 and, in a long run, segment.compile make it faster, nothing else does"
            )
        slowest = max(_REMEDIES, key=lambda step: self.wall_s[step])
        return _REMEDIES[slowest]


def print_profile(profile: Profile, console: Console) -> None:
    """Print a table of the steps, the predictors' busy share, and the bottleneck."""
    table = Table("stage", "step", title="where the time went, per image", title_justify="left")
    for header in ("ms", "core ms"):
        table.add_column(header, justify="right")
    num_images = max(1, profile.num_images)
    for stage, steps in _STAGES.items():
        for step in steps:
            seconds = (profile.wall_s[step], profile.core_s[step])
            table.add_row(stage, step, *(f"{1000 * value / num_images:.2f}" for value in seconds))
    console.print(table)
    if profile.first_s is not None:
        rate = "" if profile.images_per_s is None else f", then {profile.images_per_s:,.1f} images/s"
        console.print(f"first fragment after {profile.first_s:.1f} s{rate}", highlight=False)
    console.print(
        f"{profile.num_predictors} predictor{'s' if profile.num_predictors > 1 else ''}, busy "
        f"{profile.busy_share:.1%} of the time; bottleneck: {profile.find_bottleneck()}",
        highlight=False,
    )
