"""Profile of a run: time per step of each stage, utilisation of the predictors, and which setting to change.

The times of a fragment's steps are passed through the pipeline together with its images, and the driver adds them up.
Reading a clock costs nothing compared with processing an image, so times are always recorded, and shown on request.
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

_BUSY_SHARE = 0.9  # Above this share the predictors limit the rate; faster reading or decoding would not help.

STEPS_TYPE = pa.list_(pa.struct([("step", pa.string()), ("wall_s", pa.float64()), ("core_s", pa.float64())]))


class Step(StrEnum):
    """Steps of the stages, in the order in which an image passes through them."""

    FETCH = "fetch"
    DECODE = "decode"  # includes resizing
    PACK = "pack"  # serialisation for the transfer to a predictor
    WAIT = "wait"  # a predictor waits for decoded images; its start-up is not counted
    PREDICT = "predict"  # the forward pass
    COUNT = "count"  # masks and statistics from logits
    ENCODE = "encode"
    WRITE = "write"


_STAGES = {
    "decode": (Step.FETCH, Step.DECODE, Step.PACK),
    "predict": (Step.WAIT, Step.PREDICT, Step.COUNT),
    "write": (Step.ENCODE, Step.WRITE),
}
_REMEDIES = {
    Step.FETCH: "reading from the store: raise segment.num_fetch_threads",
    Step.DECODE: "decoding: add CPUs to the cluster, store JPEG instead of PNG, or decode large JPEG images at a "
    "fraction of their size (segment.reduce_jpeg)",
    Step.PACK: "copying in memory: lower segment.fragment_size",
    Step.ENCODE: "encoding: add CPUs to the cluster; segment.mask_encoding raw is faster than png",
    Step.WRITE: "writing to the store: raise segment.fragment_size, so that there are fewer files",
}


class Stopwatch:
    """Adds up the times of one fragment's steps. Thread-safe.

    Args:
        read_core_s: Clock of CPU time in seconds: that of the calling thread, or that of the whole process if the steps
            use further threads.
    """

    def __init__(self, read_core_s: Callable[[], float] = time.thread_time) -> None:
        self._read_core_s = read_core_s
        self._seconds: dict[Step, list[float]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, step: Step) -> Iterator[None]:
        """Add the time that the block takes to a step."""
        wall_s, core_s = time.perf_counter(), self._read_core_s()
        try:
            yield
        finally:
            self.add(step, time.perf_counter() - wall_s, self._read_core_s() - core_s)

    def add(self, step: Step, wall_s: float, core_s: float = 0.0) -> None:
        """Add wall time and CPU time, in seconds, to a step."""
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
        num_predictors: Number of predictors.
        started_s: Time at which the run started, by ``time.monotonic``.
        num_images: Number of images in written fragments.
        num_first: Number of images in the first written fragment.
        first_s: Seconds from the start until the first fragment was written; None before that.
        last_s: Seconds from the start until the last fragment was written.
        wall_s: Wall time by step, summed over fragments.
        core_s: CPU time by step, summed over fragments.
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
        """Add a fragment that was just written; ``steps`` are rows of ``STEPS_TYPE``."""
        self.last_s = time.monotonic() - self.started_s
        if self.first_s is None:
            self.first_s, self.num_first = self.last_s, num_images
        self.num_images += num_images
        for row in steps:
            self.wall_s[Step(row["step"])] += row["wall_s"]
            self.core_s[Step(row["step"])] += row["core_s"]

    @property
    def images_per_s(self) -> float | None:
        """Images per second after the first fragment; None with fewer than two fragments."""
        if self.first_s is None or self.last_s <= self.first_s:
            return None
        return (self.num_images - self.num_first) / (self.last_s - self.first_s)

    @property
    def busy_share(self) -> float:
        """Share, 0 to 1, of the predictors' time after start-up that they did not spend waiting for images."""
        seconds = [self.wall_s[step] for step in _STAGES["predict"]]
        return 1 - self.wall_s[Step.WAIT] / sum(seconds) if sum(seconds) else 0.0

    def find_bottleneck(self) -> str:
        """Return the step that limits the rate of the run, and the settings that make it faster."""
        if self.busy_share >= _BUSY_SHARE:
            return (
                "the model: only more predictors or GPUs (segment.num_predictors, segment.num_gpus_per_predictor), "
                "segment.precision bf16 and, in a long run, segment.compile make the run faster"
            )
        slowest = max(_REMEDIES, key=lambda step: self.wall_s[step])
        return _REMEDIES[slowest]


def print_profile(profile: Profile, console: Console) -> None:
    """Print a table of the steps, the utilisation of the predictors, and the bottleneck."""
    table = Table("stage", "step", title="time per image", title_justify="left")
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
