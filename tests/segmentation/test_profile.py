"""Profile of a run: sums over fragments, and the bottleneck derived from them."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from segray.segmentation.driver import run_segmentation
from segray.segmentation.job import SegmentJob
from segray.segmentation.profile import Profile, Step, Stopwatch
from tests.segmented import SETTINGS


def make_profile(**wall_s: float) -> Profile:
    watch = Stopwatch()
    for name, seconds in wall_s.items():
        watch.add(Step(name), seconds)
    profile = Profile(2, time.monotonic())
    profile.add(8, watch.to_rows())
    return profile


def test_a_stopwatch_counts_wall_time_and_cpu_time_separately() -> None:
    watch = Stopwatch()
    with watch.measure(Step.FETCH):
        time.sleep(0.05)
    (row,) = watch.to_rows()
    assert row["step"] == "fetch"
    assert row["wall_s"] >= 0.05
    assert row["core_s"] < 0.04


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"predict": 9, "count": 0.5, "wait": 0.5, "decode": 30}, "the model"),
        ({"predict": 5, "wait": 5, "decode": 8, "fetch": 2}, "decoding"),
        ({"predict": 5, "wait": 5, "decode": 2, "fetch": 80}, "num_fetch_threads"),
        ({"predict": 5, "wait": 5, "write": 9}, "fragment_size"),
    ],
)
def test_the_bottleneck_is_named(seconds: dict[str, float], expected: str) -> None:
    assert expected in make_profile(**seconds).find_bottleneck()


def test_rate_and_utilisation_are_computed_from_the_sums() -> None:
    profile = make_profile(predict=3, count=1, wait=1)
    assert profile.busy_share == 0.8
    assert profile.images_per_s is None  # undefined for a single fragment
    profile.last_s, profile.first_s = 4.0, 2.0
    profile.num_images += 10
    assert profile.images_per_s == 5


@pytest.mark.usefixtures("ray_session")
def test_the_printed_profile_lists_all_steps(bundle_dir: Path, bucket: Path, tmp_path: Path) -> None:
    printed = io.StringIO()
    job = SegmentJob(str(bundle_dir), (str(bucket / "images"),), str(tmp_path / "run"), (), SETTINGS)
    run_segmentation(job, Console(file=printed, width=120), with_profile=True)
    table = {line.split()[3]: line.split()[5] for line in printed.getvalue().splitlines() if line.count("│") == 5}
    assert table.keys() >= {str(step) for step in Step}
    # Fetching counts only the time that decoding waited for it, which may be zero.
    zero = {step for step in ("decode", "pack", "predict", "count", "encode", "write") if not float(table[step])}
    assert not zero, printed.getvalue()
    assert "1 predictor, busy" in printed.getvalue()
    again = io.StringIO()
    run_segmentation(job, Console(file=again, width=120), with_profile=True)
    assert "nothing to profile" in again.getvalue()
