"""Runs of training: stopped early, on several workers, with wrong input, a stalled worker, FSDP, and slow storage."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from segray.errors import DataError, TrainingError
from segray.models.bundle import load_bundle
from segray.training.checkpoint import find_newest_state
from tests.faults.object_store import ObjectStore
from tests.faults.proxy import Call, FaultProxy, Request, Rule
from tests.faults.scene import build_environment
from tests.processes import find_workers
from tests.training.ray_runs import (
    TRAIN_WORKER,
    MakeConfig,
    find_new_train_worker,
    read_metrics,
    read_weights_sha256,
    train,
    train_with_killed_worker,
    wait_for,
)

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


@pytest.mark.slow  # tests/training/test_ranks.py compares ranks without FSDP and without Ray.
@pytest.mark.usefixtures("ray_session")
def test_two_fsdp_workers_learn_the_same_as_one_worker_and_after_one_is_killed(
    make_train_config: MakeConfig, tmp_path: Path
) -> None:
    settings = {"precision": "fp32", "num_epochs": 3, "ema_decay": 0.8, "max_gradient_norm": 1.0}
    settings |= {"sync_batchnorm": True, "checkpoint_every_steps": 2}
    train(make_train_config(tmp_path / "one", num_train_workers=1, **settings))
    train(make_train_config(tmp_path / "two", sharding="fsdp", **settings))
    printed = train_with_killed_worker(make_train_config(tmp_path / "killed", sharding="fsdp", **settings))
    one, two, killed = (read_metrics(tmp_path / name) for name in ("one", "two", "killed"))
    assert [float(row["loss"]) for row in two] == pytest.approx([float(row["loss"]) for row in one], abs=1e-4)
    for score in ("val_mean_iou", "val_pixel_accuracy", "val_mean_boundary_iou"):
        assert [float(row[score]) for row in two] == pytest.approx([float(row[score]) for row in one], abs=5e-3)
    load_bundle(str(tmp_path / "two" / "bundle"))
    assert "resuming after " in printed, printed
    assert read_weights_sha256(tmp_path / "killed") == read_weights_sha256(tmp_path / "two")
    assert killed == two


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


@pytest.mark.usefixtures("ray_session")
def test_bad_labels_are_an_error_before_anything_is_written(make_train_config: MakeConfig, tmp_path: Path) -> None:
    config = make_train_config(tmp_path)
    data = config.data.model_copy(update={"class_values": (1, 2, 4)})
    with pytest.raises(DataError, match=r"18 bad labels in train .*mask value 3 is not declared.*and 15 more"):
        train(config.model_copy(update={"data": data}))
    assert list(tmp_path.iterdir()) == []  # So corrected settings may use the same output.


@pytest.mark.usefixtures("ray_session")
def test_a_stalled_worker_ends_the_run_with_an_error_that_names_rank_and_step(
    make_train_config: MakeConfig, tmp_path: Path
) -> None:
    earlier_workers = find_workers(TRAIN_WORKER)
    stopped: list[psutil.Process] = []

    def stop_worker() -> None:
        wait_for(lambda: find_newest_state(str(tmp_path / "ray_train"), lambda _: None) is not None)
        stopped.append(find_new_train_worker(earlier_workers))
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
