"""Runs of training: stopped early, on several workers, with wrong input, a stalled worker, FSDP, and slow storage."""

import csv
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import segmentation_models_pytorch as smp
import yaml
from safetensors.torch import save_file

from segray.config import TrainConfig
from segray.errors import DataError, TrainingError
from segray.models.bundle import load_bundle
from segray.training.checkpoint import find_newest_state
from tests.faults.object_store import ObjectStore
from tests.faults.proxy import Call, FaultProxy, Request, Rule
from tests.faults.scene import build_environment
from tests.processes import find_workers
from tests.training.ray_runs import (
    STEPS_PER_EPOCH,
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


def change_train(config: TrainConfig, **train: object) -> TrainConfig:
    """Return a configuration with other settings of ``train``, instead of ``num_epochs``."""
    values = config.model_dump(mode="json")
    kept = {name: value for name, value in values["train"].items() if name not in ("num_epochs", "time_budget_min")}
    return TrainConfig.model_validate({**values, "train": {**kept, **train}})


@pytest.mark.usefixtures("ray_session")
def test_a_finished_run_goes_on_with_more_epochs_fewer_workers_another_precision_and_no_model_hub(
    make_train_config: MakeConfig,
    tmp_path: Path,
    make_hub_snapshot: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cache of the model hub exists only for this process: workers have neither it nor a network.

    The output is relative, and workers have another current folder.
    """
    monkeypatch.chdir(tmp_path)
    snapshot = make_hub_snapshot("resnet18", "imagenet")
    save_file(smp.encoders.get_encoder("resnet18").state_dict(), snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps({"mean": [0, 0, 0], "std": [1, 1, 1]}))
    values = make_train_config(Path("run"), num_epochs=1, precision="fp32").model_dump(mode="json")
    config = TrainConfig.model_validate({**values, "model": {"encoder_weights": "imagenet", "freeze_encoder": True}})
    train(config)
    shutil.rmtree(tmp_path / "hub")
    next((tmp_path / "run" / "pretrained").glob("*.safetensors")).unlink()  # The checkpoint has all weights.
    longer = change_train(config, num_epochs=2, num_train_workers=1, precision="bf16")
    printed = train(longer)
    assert "train.num_epochs: the run has 1, got 2" in printed, printed
    assert "the learning-rate schedule is recomputed over 2 epochs" in printed, printed
    assert "labels were checked on" in printed, printed
    assert "number of workers: the run has 2, got 1" in printed, printed
    assert [row["epoch"] for row in read_metrics(tmp_path / "run")] == ["1", "2"]
    assert "train.num_epochs: the run has 1, got 2" in (tmp_path / "run" / "bundle" / "model_card.md").read_text()
    assert "nothing to do" in train(longer)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_a_run_with_a_time_budget_equals_one_with_its_number_of_epochs_and_logs_steps(
    make_train_config: MakeConfig, tmp_path: Path
) -> None:
    budget, given = make_train_config(tmp_path / "budget"), make_train_config(tmp_path / "given")
    settings = {"sampling": "class_balanced", "num_train_workers": 1}
    config = change_train(budget, time_budget_min=0.02, log_every_steps=2, **settings)
    printed = train(config)
    num_epochs = json.loads((tmp_path / "budget" / "time_budget.json").read_text())["num_epochs"]
    assert f"train.num_epochs is {num_epochs}, at " in printed, printed
    train(change_train(given, num_epochs=num_epochs, **settings))
    assert read_weights_sha256(tmp_path / "budget") == read_weights_sha256(tmp_path / "given")
    assert "nothing to do" in train(config)
    rows = list(csv.DictReader((tmp_path / "budget" / "steps.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(2, num_epochs * STEPS_PER_EPOCH + 1, 2))
    assert all(float(row["loss"]) > 0 and float(row["images_per_s"]) > 0 for row in rows)


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
