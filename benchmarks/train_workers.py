"""Training with two workers of one thread beside one worker of one thread, by `segray train` itself.

    python benchmarks/train_workers.py [--epochs 4]

CamVid's U-Net of jobs/camvid.yaml, on gloo. The single worker is given one core of the machine, the two have two.
Images per second as the run's own metrics tell them, the median of the epochs after the first.
"""

import argparse
import csv
import shutil
import statistics
import sys
from pathlib import Path

from measuring import report, run_measured

_ROOT = Path(__file__).parents[1]
_OUTPUT = _ROOT / "runs/benchmarks/workers"


def train(num_workers: int, epochs: int) -> list[float]:
    """Return images per second of each epoch but the first."""
    shutil.rmtree(_OUTPUT, ignore_errors=True)
    cores = ",".join(str(core) for core in range(num_workers))
    settings = {
        "output": _OUTPUT,
        "train.num_train_workers": num_workers,
        "train.num_epochs": epochs,
        "train.eval_every_epochs": epochs,
    }
    command = ["taskset", "--cpu-list", cores, str(Path(sys.executable).with_name("segray")), "train"]
    command += [str(_ROOT / "jobs/camvid.yaml")]
    run_measured(command + [part for name, value in settings.items() for part in ("--set", f"{name}={value}")])
    with (_OUTPUT / "metrics.csv").open() as file:
        return [float(row["images_per_s"]) for row in csv.DictReader(file)][1:]


def main() -> None:
    """Measure one worker and two in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    epochs = parser.parse_args().epochs
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(2):
        for number in rates:
            rates[number] += train(number, epochs)
    median = {number: statistics.median(values) for number, values in rates.items()}
    rows = [[f"{number} of 1 thread", f"{rate:.2f}", f"{rate / median[1]:.2f}"] for number, rate in median.items()]
    report("train_workers", ["workers", "images/s", "times one"], rows, {"images_per_s": rates})


if __name__ == "__main__":
    main()
