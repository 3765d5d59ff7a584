"""Interrupted training on Ray: after a worker or the driver is killed, the weights are identical to the last bit."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from segray.errors import TrainingError
from segray.training.checkpoint import find_newest_state
from tests.training.ray_runs import (
    MakeConfig,
    find_train_workers,
    is_in_mid_epoch,
    make_config,
    read_metrics,
    read_weights_sha256,
    train,
    train_with_killed_worker,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("ray_session")


def test_weights_are_identical_after_a_worker_is_killed_mid_epoch(
    uninterrupted_run: Path, make_train_config: MakeConfig, tmp_path: Path
) -> None:
    printed = train_with_killed_worker(make_config(make_train_config, tmp_path))
    assert "resuming after " in printed, printed
    assert read_weights_sha256(tmp_path) == read_weights_sha256(uninterrupted_run)
    assert read_metrics(tmp_path) == read_metrics(uninterrupted_run)


def test_weights_are_identical_after_the_driver_is_killed_mid_epoch(
    uninterrupted_run: Path, make_train_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(make_train_config, tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-c", "from segray.cli import main; main()", "train", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (tmp_path / "printed.txt").open("w") as printed_file:
        driver = subprocess.Popen(command, stdout=printed_file, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(lambda: driver.poll() is not None or is_in_mid_epoch(tmp_path / "run"))
        assert driver.poll() is None, (tmp_path / "printed.txt").read_text()
    finally:  # Even if the test fails: a driver left alive would disturb the next test.
        driver.kill()
        driver.wait()
    assert not (tmp_path / "run" / "bundle").exists()
    # If the driver dies while Ray Train writes its list of checkpoints, the list can be empty; Ray then never resumes.
    (tmp_path / "run" / "ray_train" / "checkpoint_manager_snapshot.json").write_text("")
    printed = train(config)
    assert "resuming after " in printed, printed
    assert read_weights_sha256(tmp_path / "run") == read_weights_sha256(uninterrupted_run)
    assert read_metrics(tmp_path / "run") == read_metrics(uninterrupted_run)


def test_a_stalled_worker_ends_the_run_with_an_error_that_names_rank_and_step(
    make_train_config: MakeConfig, tmp_path: Path
) -> None:
    earlier_workers = find_train_workers()
    stopped: list[psutil.Process] = []

    def stop_worker() -> None:
        wait_for(lambda: find_newest_state(str(tmp_path / "ray_train"), lambda _: None) is not None)
        workers = find_train_workers()
        stopped.append(workers[max(workers.keys() - earlier_workers)])
        stopped[0].suspend()

    config = make_train_config(tmp_path, num_epochs=500, stall_timeout_s=12, checkpoint_every_steps=1)
    with ThreadPoolExecutor(1) as executor:
        stopper = executor.submit(stop_worker)
        try:
            with pytest.raises(
                TrainingError,
                match=r"no progress for 12 s \(train\.stall_timeout_s\); stalled: rank [01] in step \d+ \([\w ]+\); to",
            ):
                train(config)
        finally:
            stopper.result()
            with suppress(psutil.NoSuchProcess):  # Ray may have ended it already.
                stopped[0].kill()
