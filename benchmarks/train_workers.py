"""Compare the training speed of one and two workers with one thread each.

    python benchmarks/train_workers.py [--epochs 4] [--rounds 2] [--batch-size 8 32]

Runs `segray train` with the U-Net of jobs/camvid.yaml, on gloo. One worker gets one core of the machine, two get two.
The results are medians of the run's own images per second over all epochs but the first.
"""

import argparse
import csv
import itertools
import shutil
import statistics
import sys
from pathlib import Path

from measuring import report, run_measured

_ROOT = Path(__file__).parents[1]
_OUTPUT = _ROOT / "runs/benchmarks/workers"


def train(num_workers: int, epochs: int, batch_size: int) -> list[float]:
    """Return images per second for each epoch but the first."""
    shutil.rmtree(_OUTPUT, ignore_errors=True)
    cores = ",".join(str(core) for core in range(num_workers))
    settings = {
        "output": _OUTPUT,
        "train.num_train_workers": num_workers,
        "train.global_batch_size": batch_size,
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
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8, 32])
    arguments = parser.parse_args()
    rates: dict[tuple[int, int], list[float]] = {}
    for _, batch_size, num_workers in itertools.product(range(arguments.rounds), arguments.batch_size, (1, 2)):
        rates.setdefault((batch_size, num_workers), []).extend(train(num_workers, arguments.epochs, batch_size))
    median = {key: statistics.median(values) for key, values in rates.items()}
    rows = [
        [str(batch_size), f"{number} of 1 thread", f"{rate:.2f}", f"{rate / median[batch_size, 1]:.2f}"]
        for (batch_size, number), rate in median.items()
    ]
    figures = [
        {"batch_size": size, "num_workers": number, "images_per_s": rate} for (size, number), rate in rates.items()
    ]
    report("train_workers", ["global batch", "workers", "images/s", "times one"], rows, {"runs": figures})


if __name__ == "__main__":
    main()
