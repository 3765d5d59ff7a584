"""Complete training runs: stopped early, with FSDP, and with slow storage."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from tests.faults.object_store import ObjectStore
from tests.faults.proxy import Call, FaultProxy, Request, Rule
from tests.faults.scene import build_environment
from tests.training.ray_runs import MakeConfig, read_metrics, read_weights_sha256, train, train_with_killed_worker

_TIMEOUT_S = 180


@pytest.mark.usefixtures("ray_session")
def test_a_run_that_stopped_early_is_complete(make_train_config: MakeConfig, tmp_path: Path) -> None:
    config = make_train_config(
        tmp_path,
        num_epochs=30,
        early_stopping_epochs=2,
        num_train_workers=1,
        learning_rate=1e-12,  # So that the score never rises.
    )
    printed = train(config)
    assert "epoch  3/30" in printed
    assert "epoch  4/30" not in printed
    assert [row["epoch"] for row in read_metrics(tmp_path)] == ["1", "2", "3"]
    assert "nothing to do" in train(config)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_weights_are_identical_after_a_worker_of_an_fsdp_run_is_killed(
    make_train_config: MakeConfig, tmp_path: Path
) -> None:
    settings = {"num_epochs": 4, "sharding": "fsdp", "ema_decay": 0.8, "checkpoint_every_steps": 2, "precision": "fp32"}
    train(make_train_config(tmp_path / "uninterrupted", **settings))
    printed = train_with_killed_worker(make_train_config(tmp_path / "killed", **settings))
    assert "resuming after " in printed, printed
    assert read_weights_sha256(tmp_path / "killed") == read_weights_sha256(tmp_path / "uninterrupted")
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_training_continues_while_a_checkpoint_uploads_to_slow_storage(
    make_train_config: MakeConfig, object_store: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    object_store.make_bucket("runs")
    next_epoch_done = threading.Event()
    timed_out: list[bool] = []

    def delay_upload(request: Request) -> None:
        timed_out.append(not next_epoch_done.wait(_TIMEOUT_S))

    def watch_metrics(request: Request) -> None:
        if proxy.count("PUT", r"metrics\.csv") >= 2:  # After the epoch that follows the delayed checkpoint.
            next_epoch_done.set()

    proxy.set_rules(
        Rule(Call(delay_upload), "PUT", key=r"ray_train/checkpoint_", nth=1),
        Rule(Call(watch_metrics), "PUT", key=r"metrics\.csv"),
    )
    config = make_train_config(tmp_path, num_epochs=3, num_train_workers=1)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config.model_dump(mode="json"), "output": "s3://runs/slow"}))
    store = {**object_store.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
    completed = subprocess.run(
        [sys.executable, "-c", "from segray.cli import main; main()", "train", str(path)],
        env=build_environment(**store),
        capture_output=True,
        text=True,
        timeout=2 * _TIMEOUT_S,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert timed_out == [False]
    assert "epoch 3/3" in completed.stdout
