"""Ray Train for real: what a bundle holds, and runs that are killed ending in the same bits.

The run has all that a checkpoint must hold: dropout, augmentation, averaged weights, a part of an epoch.
"""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from segray.config import TrainConfig
from segray.data.manifest import load_splits
from segray.errors import DataError, RunMismatchError, TrainingError
from segray.models.bundle import load_bundle
from segray.training.checkpoint import find_newest_state, list_checkpoints, load_state
from segray.training.driver import run_training
from segray.training.job import get_classes
from segray.training.worker.evaluation import compute_scores, evaluate
from segray.training.worker.feed import iterate_evaluation
from segray.training.worker.sample_store import SampleStore
from tests.conftest import NUM_TEST, NUM_TRAIN, PET_CLASSES, SHAPE_SIZE

pytestmark = pytest.mark.usefixtures("ray_session")
NUM_EPOCHS = 4
STEPS_PER_EPOCH = NUM_TRAIN // 6
ALL_AT_ONCE = {
    "num_epochs": NUM_EPOCHS,
    "ema_decay": 0.8,
    "max_gradient_norm": 1.0,
    "num_accumulation_steps": 3,
    "sync_batchnorm": True,
    "checkpoint_every_steps": 2,
    "precision": "fp32",
}
_DEADLINE_S = 120
MakeConfig = Callable[..., TrainConfig]


def train(config: TrainConfig) -> str:
    """Train, and return what was printed."""
    output = io.StringIO()
    run_training(config, Console(file=output, width=500))
    return output.getvalue()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


def make_config(make: MakeConfig, output: Path, **train: object) -> TrainConfig:
    config = make(output, **{**ALL_AT_ONCE, **train})
    return TrainConfig.model_validate(
        {
            **config.model_dump(),
            "model": {"arch": "deeplabv3plus"},  # which has dropout
            "augmentation": "strong",
            "loss": {"ce": 1.0, "dice": 0.5},
        }
    )


def is_in_mid_epoch(output: Path) -> bool:
    """Say whether a run's newest checkpoint is of the middle of an epoch."""
    found = find_newest_state(str(output / "ray_train"), lambda _: None)
    return found is not None and found[1].num_steps_done % STEPS_PER_EPOCH != 0


def find_train_workers() -> dict[int, psutil.Process]:
    """Return the training workers under this process by pid."""
    return {p.pid: p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()}


@pytest.fixture(scope="module")
def unbroken(make_train_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    output = tmp_path_factory.mktemp("unbroken")
    printed = train(make_config(make_train_config, output))
    (output / "printed.txt").write_text(printed)
    return output


def read_weights_sha256(output: Path) -> str:
    return str(json.loads((output / "bundle" / "bundle.json").read_text())["weights_sha256"])


def read_metrics(output: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((output / "bundle" / "metrics.csv").open()))
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in rows]


def test_the_first_line_says_what_is_trained_on_what(unbroken: Path) -> None:
    first, *others = (unbroken / "printed.txt").read_text().splitlines()
    for part in ("CPU", "2 workers", f"{NUM_TRAIN} train", f"{NUM_TEST} val", "3 classes: pet, background, border"):
        assert part in first
    assert [line.split()[1] for line in others] == [f"{epoch}/{NUM_EPOCHS}" for epoch in range(1, NUM_EPOCHS + 1)]


def test_the_bundle_is_the_best_epoch_with_its_history_and_pictures(unbroken: Path) -> None:
    manifest = load_bundle(str(unbroken / "bundle")).manifest
    rows = read_metrics(unbroken)
    scores = [float(row["val_mean_iou"]) for row in rows]
    assert manifest.metrics["epoch"] == scores.index(max(scores)) + 1
    assert manifest.metrics["val_mean_iou"] == max(scores)
    assert manifest.config["train"]["num_epochs"] == NUM_EPOCHS
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, NUM_EPOCHS + 1)]
    assert {"loss", "learning_rate", "val_dataset_iou_pet", "val_dataset_dice_border"} <= rows[0].keys()
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert (unbroken / "metrics.csv").read_bytes() == (unbroken / "bundle" / "metrics.csv").read_bytes()
    for name in ("curves.png", "confusion.png", "best.png", "worst.png"):
        assert Image.open(unbroken / "bundle" / name).width > 400


def test_the_model_card_says_data_settings_scores_and_limits(unbroken: Path) -> None:
    card = (unbroken / "bundle" / "model_card.md").read_text()
    metrics = load_bundle(str(unbroken / "bundle")).manifest.metrics
    for part in (
        "# deeplabv3plus on resnet18",
        f"{NUM_TRAIN} labelled images to train on, {NUM_TEST} to validate on",
        f"{metrics['val_mean_iou']:.4f}",
        f"| border | {metrics['val_dataset_iou'][2]:.4f} |",
        "1.0 x ce + 0.5 x dice, class weights none",
        "averaged with a decay of 0.8",
        "horizontal_flip 0.5, scale (0.5, 2.0)",
        "## Limits",
    ):
        assert part in card


def test_the_newest_two_and_the_best_checkpoint_are_kept(unbroken: Path) -> None:
    history = read_metrics(unbroken)
    scores = [float(row["val_mean_iou"]) for row in history]
    best = max(range(NUM_EPOCHS), key=lambda index: (scores[index], index)) + 1
    kept = {load_state(uri).num_steps_done for uri in list_checkpoints(str(unbroken / "ray_train"))}
    last = NUM_EPOCHS * STEPS_PER_EPOCH
    assert kept == {best * STEPS_PER_EPOCH, last, last - 2}  # the one before the last was in mid-epoch


def test_the_bundles_weights_score_as_was_said(unbroken: Path, make_train_config: MakeConfig) -> None:
    bundle = load_bundle(str(unbroken / "bundle"))
    config = make_config(make_train_config, unbroken)
    batches = iterate_evaluation(
        load_splits(config.data).val,
        SampleStore(PET_CLASSES, 0),
        config.image_size,
        batch_size=config.train.eval_batch_size,
        world_rank=0,
        world_size=1,
        num_threads=1,
    )
    counts = evaluate(
        bundle.model,
        batches,
        classes=get_classes(config),
        preprocessing=bundle.manifest.preprocessing,
        device=torch.device("cpu"),
        precision="fp32",
    )
    assert compute_scores(counts)["val_mean_iou"] == pytest.approx(bundle.manifest.metrics["val_mean_iou"], abs=1e-3)


def test_validation_scores_every_pixel_once(unbroken: Path) -> None:
    confusion = load_bundle(str(unbroken / "bundle")).manifest.metrics["val_confusion"]
    assert sum(map(sum, confusion)) == NUM_TEST * SHAPE_SIZE**2


def test_a_worker_killed_in_mid_epoch_changes_no_bit(
    unbroken: Path, make_train_config: MakeConfig, tmp_path: Path
) -> None:
    of_runs_before = find_train_workers()

    def kill_a_worker() -> None:
        wait_for(lambda: is_in_mid_epoch(tmp_path))
        workers = find_train_workers()
        workers[max(workers.keys() - of_runs_before)].kill()

    with ThreadPoolExecutor(1) as executor:
        killer = executor.submit(kill_a_worker)
        printed = train(make_config(make_train_config, tmp_path))
        killer.result()
    assert "going on after " in printed, printed
    assert read_weights_sha256(tmp_path) == read_weights_sha256(unbroken)
    assert read_metrics(tmp_path) == read_metrics(unbroken)


def test_a_driver_killed_in_mid_epoch_changes_no_bit(
    unbroken: Path, make_train_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(make_train_config, tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-c", "from segray.cli import main; main()", "train", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    wait_for(lambda: is_in_mid_epoch(tmp_path / "run"))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "run" / "bundle").exists()
    # what a driver can leave that dies while Ray Train writes its list of checkpoints; Ray alone never starts again
    (tmp_path / "run" / "ray_train" / "checkpoint_manager_snapshot.json").write_text("")
    printed = train(config)
    assert "going on after " in printed, printed
    assert read_weights_sha256(tmp_path / "run") == read_weights_sha256(unbroken)
    assert read_metrics(tmp_path / "run") == read_metrics(unbroken)


def test_a_finished_run_is_found_finished(unbroken: Path, make_train_config: MakeConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    assert "nothing to do" in train(make_config(make_train_config, unbroken))
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before


def test_another_configuration_is_refused(unbroken: Path, make_train_config: MakeConfig) -> None:
    with pytest.raises(RunMismatchError, match=r"train\.learning_rate: there 0\.001, here 0\.5.*another output"):
        train(make_config(make_train_config, unbroken, learning_rate=0.5))


def test_bad_labels_stop_a_run_before_it_starts(make_train_config: MakeConfig, tmp_path: Path) -> None:
    config = make_train_config(tmp_path)
    data = config.data.model_copy(update={"class_values": (1, 2, 4)})
    with pytest.raises(DataError, match=r"18 bad labels in train .*mask value 3 not declared.*and 15 more"):
        train(config.model_copy(update={"data": data}))
    assert list(tmp_path.iterdir()) == []  # mended settings may use the same output


def test_a_loss_that_is_not_finite_names_step_and_images(make_train_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"loss is (nan|inf) at step \d+, before the weights moved.*\.jpg"
    ) as caught:
        train(make_train_config(tmp_path, learning_rate=1e30, weight_decay=0, num_epochs=3))
    assert str(caught.value).count(".jpg") == 6  # the global batch
    assert not (tmp_path / "bundle").exists()


def test_a_worker_that_stalls_ends_the_run_with_its_rank_and_step(
    make_train_config: MakeConfig, tmp_path: Path
) -> None:
    of_runs_before = find_train_workers()
    stopped: list[psutil.Process] = []

    def stop_a_worker() -> None:
        wait_for(lambda: find_newest_state(str(tmp_path / "ray_train"), lambda _: None) is not None)
        workers = find_train_workers()
        stopped.append(workers[max(workers.keys() - of_runs_before)])
        stopped[0].suspend()

    config = make_train_config(tmp_path, num_epochs=500, stall_timeout_s=8, checkpoint_every_steps=1)
    with ThreadPoolExecutor(1) as executor:
        stopper = executor.submit(stop_a_worker)
        try:
            with pytest.raises(
                TrainingError,
                match=r"not moved for 8 s \(train\.stall_timeout_s\); stalled: rank [01] in step \d+ \(\w+\)\. The",
            ):
                train(config)
        finally:
            stopper.result()
            with suppress(psutil.NoSuchProcess):  # Ray has ended it
                stopped[0].kill()


def test_one_worker_two_and_weights_split_over_two_learn_the_same(
    make_train_config: MakeConfig, tmp_path: Path
) -> None:
    rows = []
    runs: dict[str, dict[str, object]] = {"one": {"num_train_workers": 1}, "two": {}, "split": {"sharding": "fsdp"}}
    for name, settings in runs.items():
        config = make_train_config(
            tmp_path / name, sync_batchnorm=True, precision="fp32", ema_decay=0.5, max_gradient_norm=1.0, **settings
        )
        small = {"arch": "classic_unet", "widths": [8, 16]}
        train(TrainConfig.model_validate({**config.model_dump(), "model": small}))
        rows.append(read_metrics(tmp_path / name))
    one, two, split = rows
    for other in (two, split):
        assert [float(row["loss"]) for row in other] == pytest.approx([float(row["loss"]) for row in one], abs=1e-4)
        for score in ("val_mean_iou", "val_pixel_accuracy", "val_mean_boundary_iou"):
            assert [float(row[score]) for row in other] == pytest.approx([float(row[score]) for row in one], abs=5e-3)
    load_bundle(str(tmp_path / "split" / "bundle"))
