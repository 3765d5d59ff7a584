"""Compare the training speed of `segray train` and a textbook Keras script: FCN-8s with a frozen VGG16 at 224x224.

    python benchmarks/train_keras.py [--epochs 3] [--rounds 2] [--batch-size 32]

Both train on CamVid's images from random weights, which do not affect speed; segray uses jobs/pet_fcn8s.yaml. The
results are medians of images per second over all epochs but the first, in which images are decoded and kernels
selected. TensorFlow is first installed into a separate environment.
"""

import argparse
import csv
import re
import shutil
import statistics
import subprocess
import sys
import venv
from pathlib import Path

from measuring import report, run_measured

_ROOT = Path(__file__).parents[1]
_DATA = _ROOT / "data/camvid"
_RUNS = _ROOT / "runs/benchmarks"
_TENSORFLOW = "tensorflow-cpu==2.21.0"


def prepare_keras() -> Path:
    """Return the Python interpreter of an environment with TensorFlow, which is created if necessary."""
    folder = _RUNS / "keras"
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", _TENSORFLOW, "pillow"], check=True)
    return python


def train_keras(epochs: int, batch_size: int) -> list[float]:
    """Return images per second of the Keras script for each epoch but the first."""
    script = [str(prepare_keras()), str(_ROOT / "benchmarks/rivals/keras_fcn8s.py")]
    folders = [str(_DATA / "images/train"), str(_DATA / "masks/train")]
    run = run_measured([*script, *folders, "--epochs", str(epochs), "--batch-size", str(batch_size)])
    return [float(rate) for rate in re.findall(r"^images/s (.*)$", run.output, re.MULTILINE)][1:]


def train_segray(epochs: int, batch_size: int, precision: str) -> list[float]:
    """Return images per second of segray for each epoch but the first, from its own metrics."""
    output = _RUNS / "fcn8s"
    shutil.rmtree(output, ignore_errors=True)
    settings = {
        "output": output,
        "model.encoder_weights": "null",
        "train.use_gpu": "false",
        "train.precision": precision,
        "train.num_epochs": epochs,
        "train.eval_every_epochs": epochs,
        "train.global_batch_size": batch_size,
        "augmentation": "none",
    }
    job = _RUNS / "fcn8s.yaml"
    text = (_ROOT / "jobs/pet_fcn8s.yaml").read_text()
    camvid = re.search(r"^data:\n(?:  .*\n)+", (_ROOT / "jobs/camvid.yaml").read_text(), re.MULTILINE)
    assert camvid
    job.write_text(re.sub(r"^data:\n(?:  .*\n)+", lambda _: camvid.group(), text, flags=re.MULTILINE))
    command = [str(Path(sys.executable).with_name("segray")), "train", str(job)]
    run_measured(command + [part for name, value in settings.items() for part in ("--set", f"{name}={value}")])
    with (output / "metrics.csv").open() as file:
        return [float(row["images_per_s"]) for row in csv.DictReader(file)][1:]


def main() -> None:
    """Measure both in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="bf16")
    arguments = parser.parse_args()
    ours = f"segray, {arguments.precision}"
    rates: dict[str, list[float]] = {"Keras, fp32": [], ours: []}
    for _ in range(arguments.rounds):
        rates["Keras, fp32"] += train_keras(arguments.epochs, arguments.batch_size)
        rates[ours] += train_segray(arguments.epochs, arguments.batch_size, arguments.precision)
        print(rates, flush=True)
    median = {name: statistics.median(values) for name, values in rates.items()}
    rows = [[name, f"{rate:.2f}", f"{rate / median['Keras, fp32']:.2f}"] for name, rate in median.items()]
    figures = {"images_per_s": rates, "batch_size": arguments.batch_size, "tensorflow": _TENSORFLOW}
    report("train_keras", ["training by", "images/s", "times Keras"], rows, figures)


if __name__ == "__main__":
    main()
