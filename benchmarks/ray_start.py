"""Measure how long Ray takes to start, a lower bound for the time to the first fragment of `segray segment`.

    python benchmarks/ray_start.py [--rounds 3]

Runs the smallest Ray Data pipeline with an actor, which returns its only row, without torch or images. Each round is a
new process that starts Ray in the same way as segray.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measuring import report

_STAGES = ("Python and segray's connection imported", "Ray started", "Ray Data imported", "first row through an actor")


class Echo:
    """An actor that returns its input."""

    def __call__(self, batch: object) -> object:
        """Return the batch."""
        return batch


def run_pipeline(started_s: float) -> None:
    """Run the pipeline, and print the seconds since ``started_s`` at the end of each stage."""
    from segray.runtime.connect import connect_ray

    print(time.time() - started_s)
    with connect_ray():
        print(time.time() - started_s)
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        print(time.time() - started_s)
        rows = ray.data.from_items([0]).map_batches(Echo, compute=ray.data.ActorPoolStrategy(size=1))
        assert rows.take_all() == [{"item": 0}]
        print(time.time() - started_s)


def main() -> None:
    """Measure several starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    times = []
    for _ in range(rounds):
        command = [sys.executable, str(Path(__file__)), "--started", repr(time.time())]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        times.append([float(line) for line in printed.stdout.split()])
        print(times[-1], flush=True)
    medians = [statistics.median(values) for values in zip(*times, strict=True)]
    rows = [[stage, f"{seconds:.1f}"] for stage, seconds in zip(_STAGES, medians, strict=True)]
    report("ray_start", ["since the start of the process", "s"], rows, {"seconds": times})


if __name__ == "__main__":
    if "--started" in sys.argv:
        run_pipeline(float(sys.argv[-1]))
    else:
        main()
