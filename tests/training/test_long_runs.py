"""Whole runs: stopped early, with weights split over ranks, and on a store that is slow to take a checkpoint."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from segray.config import TrainConfig
from tests.faults.object_store import ObjectStore
from tests.faults.proxy import Call, FaultProxy, Request, Rule
from tests.faults.scene import build_environment
from tests.training.test_training import (
    find_train_workers,
    is_in_mid_epoch,
    read_metrics,
    read_weights_sha256,
    train,
    wait_for,
)

MakeConfig = Callable[..., TrainConfig]
_DEADLINE_S = 180


def make_config(make: MakeConfig, output: Path, **train: object) -> TrainConfig:
    small = {"arch": "classic_unet", "widths": [8, 16]}
    return TrainConfig.model_validate({**make(output, **train).model_dump(), "model": small})


@pytest.mark.usefixtures("ray_session")
def test_a_run_stops_early_and_is_complete(make_train_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        make_train_config,
        tmp_path,
        num_epochs=30,
        early_stopping_epochs=2,
        num_train_workers=1,
        learning_rate=1e-12,  # learns nothing
    )
    printed = train(config)
    assert "epoch  3/30" in printed
    assert "epoch  4/30" not in printed
    assert [row["epoch"] for row in read_metrics(tmp_path)] == ["1", "2", "3"]
    assert "nothing to do" in train(config)


@pytest.mark.usefixtures("ray_session")
def test_split_weights_are_put_together_and_split_again_to_the_same_bits(
    make_train_config: MakeConfig, tmp_path: Path
) -> None:
    settings = {"num_epochs": 4, "sharding": "fsdp", "ema_decay": 0.8, "checkpoint_every_steps": 2, "precision": "fp32"}
    train(make_config(make_train_config, tmp_path / "unbroken", **settings))
    of_runs_before = find_train_workers()

    def kill_a_worker() -> None:
        wait_for(lambda: is_in_mid_epoch(tmp_path / "killed"))
        workers = find_train_workers()
        workers[max(workers.keys() - of_runs_before)].kill()

    with ThreadPoolExecutor(1) as executor:
        killer = executor.submit(kill_a_worker)
        printed = train(make_config(make_train_config, tmp_path / "killed", **settings))
        killer.result()
    assert "going on after " in printed, printed
    assert read_weights_sha256(tmp_path / "killed") == read_weights_sha256(tmp_path / "unbroken")
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "unbroken")


def test_steps_go_on_while_a_slow_store_takes_a_checkpoint(
    make_train_config: MakeConfig, object_store: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    object_store.make_bucket("runs")
    went_on = threading.Event()
    held_up: list[bool] = []

    def hold_up(request: Request) -> None:
        held_up.append(not went_on.wait(_DEADLINE_S))

    def note_metrics(request: Request) -> None:
        if proxy.count("PUT", r"metrics\.csv") >= 2:  # after the epoch that follows the checkpoint held up
            went_on.set()

    proxy.set_rules(
        Rule(Call(hold_up), "PUT", key=r"ray_train/checkpoint_", nth=1),
        Rule(Call(note_metrics), "PUT", key=r"metrics\.csv"),
    )
    config = make_config(make_train_config, tmp_path, num_epochs=3, num_train_workers=1)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config.model_dump(mode="json"), "output": "s3://runs/slow"}))
    store = {**object_store.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
    ended = subprocess.run(
        [sys.executable, "-c", "from segray.cli import main; main()", "train", str(path)],
        env=build_environment(**store),
        capture_output=True,
        text=True,
        timeout=2 * _DEADLINE_S,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert held_up == [False]
    assert "epoch 3/3" in ended.stdout
