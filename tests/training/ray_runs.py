"""Helpers for tests that train with Ray: start runs, interrupt them, and read their outputs."""

import csv
import io
import json
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from rich.console import Console

from segray.config import TrainConfig
from segray.training.checkpoint import find_newest_state
from segray.training.driver import run_training
from tests.conftest import NUM_TRAIN
from tests.processes import find_workers

MakeConfig = Callable[..., TrainConfig]
TRAIN_WORKER = "RayTrainWorker"  # In the command line of a training worker.
NUM_EPOCHS = 4
STEPS_PER_EPOCH = NUM_TRAIN // 6
# With these settings a checkpoint contains every kind of state; make_config adds dropout and augmentation.
STATEFUL_SETTINGS = {
    "num_epochs": NUM_EPOCHS,
    "ema_decay": 0.8,
    "max_gradient_norm": 1.0,
    "num_accumulation_steps": 3,
    "sync_batchnorm": True,
    "checkpoint_every_steps": 2,
    "precision": "fp32",
}
_TIMEOUT_S = 300  # Enough for Ray and its workers to start beside other test processes.


def make_config(make: MakeConfig, output: Path, **train: object) -> TrainConfig:
    config = make(output, **{**STATEFUL_SETTINGS, **train})
    return TrainConfig.model_validate(
        {
            **config.model_dump(),
            "model": {"arch": "deeplabv3plus", "encoder_name": "tu-test_resnet"},  # It has dropout.
            "augmentation": "strong",
            "loss": {"ce": 1.0, "dice": 0.5},
        }
    )


def train(config: TrainConfig) -> str:
    """Train in this process, and return what was printed."""
    output = io.StringIO()
    run_training(config, Console(file=output, width=500))
    return output.getvalue()


def train_with_killed_worker(config: TrainConfig) -> str:
    """Train, and kill a worker once the newest checkpoint is in the middle of an epoch; return what was printed."""
    earlier_workers = find_workers(TRAIN_WORKER)

    def kill_worker() -> None:
        wait_for_mid_epoch(Path(config.output))
        find_new_train_worker(earlier_workers).kill()

    with ThreadPoolExecutor(1) as executor:
        killer = executor.submit(kill_worker)
        printed = train(config)
        killer.result()
    return printed


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"condition not met within {_TIMEOUT_S} s"
        time.sleep(0.02)


def wait_for_mid_epoch(output: Path, driver: "subprocess.Popen[bytes] | None" = None, after_step: int = 0) -> int:
    """Wait until a run's newest checkpoint is in the middle of an epoch, after a given step; return its step."""
    step = 0

    def is_in_mid_epoch() -> bool:
        nonlocal step
        assert driver is None or driver.poll() is None, "the driver has ended"
        found = find_newest_state(str(output / "ray_train"), lambda _: None)
        step = found[1].num_steps_done if found else 0
        return step > after_step and step % STEPS_PER_EPOCH != 0

    wait_for(is_in_mid_epoch)
    return step


def find_new_train_worker(earlier: list[psutil.Process]) -> psutil.Process:
    """Return the newest training worker of this process's Ray that is not one of ``earlier``."""
    return [process for process in find_workers(TRAIN_WORKER) if process not in earlier][-1]


def read_weights_sha256(output: Path) -> str:
    return str(json.loads((output / "bundle" / "bundle.json").read_text())["weights_sha256"])


def read_metrics(output: Path) -> list[dict[str, str]]:
    """Return the rows of the bundle's metrics.csv, except the training speed."""
    rows = list(csv.DictReader((output / "bundle" / "metrics.csv").open()))
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in rows]
