"""A run that is compared with others: the content of its bundle, and the same weights to the last bit after kills."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from segray.data.manifest import load_splits
from segray.errors import RunMismatchError
from segray.models.bundle import load_bundle
from segray.models.losses import SegmentationLoss
from segray.training.checkpoint import list_checkpoints, load_state
from segray.training.job import get_classes
from segray.training.worker.evaluation import compute_loss, compute_scores, evaluate
from segray.training.worker.feed import RankShare, iterate_evaluation
from segray.training.worker.sample_store import SampleStore
from tests.conftest import NUM_TEST, NUM_TRAIN, PET_CLASSES, SHAPE_SIZE
from tests.processes import find_workers
from tests.training.ray_runs import (
    NUM_EPOCHS,
    STEPS_PER_EPOCH,
    TRAIN_WORKER,
    MakeConfig,
    make_config,
    read_metrics,
    read_weights_sha256,
    train,
    wait_for_mid_epoch,
)

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def uninterrupted_run(
    make_train_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, ray_session: None
) -> Path:
    """The output folder of a run that was not interrupted; printed.txt holds what it printed."""
    output = tmp_path_factory.mktemp("uninterrupted")
    printed = train(make_config(make_train_config, output))
    (output / "printed.txt").write_text(printed)
    return output


def test_the_first_line_names_device_workers_images_and_classes(uninterrupted_run: Path) -> None:
    first, *others = (uninterrupted_run / "printed.txt").read_text().splitlines()
    for part in ("CPU", "2 workers", f"{NUM_TRAIN} train", f"{NUM_TEST} val", "3 classes: pet, background, border"):
        assert part in first
    assert [line.split()[1] for line in others] == [f"{epoch}/{NUM_EPOCHS}" for epoch in range(1, NUM_EPOCHS + 1)]


def test_the_bundle_holds_the_best_epoch_with_history_and_pictures(uninterrupted_run: Path) -> None:
    manifest = load_bundle(str(uninterrupted_run / "bundle")).manifest
    rows = read_metrics(uninterrupted_run)
    scores = [float(row["val_mean_iou"]) for row in rows]
    assert manifest.metrics["epoch"] == scores.index(max(scores)) + 1
    assert manifest.metrics["val_mean_iou"] == max(scores)
    assert manifest.config["train"]["num_epochs"] == NUM_EPOCHS
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, NUM_EPOCHS + 1)]
    assert {"loss", "learning_rate", "val_dataset_iou_pet", "val_dataset_dice_border"} <= rows[0].keys()
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    bundle_csv = uninterrupted_run / "bundle" / "metrics.csv"
    assert (uninterrupted_run / "metrics.csv").read_bytes() == bundle_csv.read_bytes()
    for name in ("curves.png", "confusion.png", "best.png", "worst.png"):
        assert Image.open(uninterrupted_run / "bundle" / name).width > 400


def test_the_model_card_describes_data_settings_scores_and_limits(uninterrupted_run: Path) -> None:
    card = (uninterrupted_run / "bundle" / "model_card.md").read_text()
    metrics = load_bundle(str(uninterrupted_run / "bundle")).manifest.metrics
    for part in (
        "# deeplabv3plus on tu-test_resnet",
        f"{NUM_TRAIN} labelled images for training, {NUM_TEST} for validation",
        f"{metrics['val_mean_iou']:.4f}",
        f"| border | {metrics['val_dataset_iou'][2]:.4f} |",
        "1.0 x ce + 0.5 x dice, class weights none",
        "averaged with a decay of 0.8",
        "horizontal_flip 0.5, scale (0.5, 2.0)",
        "## Limits",
    ):
        assert part in card


def test_the_newest_two_and_the_best_checkpoint_are_kept(uninterrupted_run: Path) -> None:
    history = read_metrics(uninterrupted_run)
    scores = [float(row["val_mean_iou"]) for row in history]
    best = max(range(NUM_EPOCHS), key=lambda index: (scores[index], index)) + 1
    kept = {load_state(uri).num_steps_done for uri in list_checkpoints(str(uninterrupted_run / "ray_train"))}
    last = NUM_EPOCHS * STEPS_PER_EPOCH
    # The checkpoint before the last is in the middle of an epoch.
    assert kept == {best * STEPS_PER_EPOCH, last, last - 2}


def test_the_bundle_weights_reproduce_the_recorded_score(
    uninterrupted_run: Path, make_train_config: MakeConfig
) -> None:
    bundle = load_bundle(str(uninterrupted_run / "bundle"))
    config = make_config(make_train_config, uninterrupted_run)
    batches = iterate_evaluation(
        load_splits(config.data).val,
        SampleStore(PET_CLASSES, 0),
        config.image_size,
        config.train.eval_batch_size,
        RankShare(),
    )
    counts = evaluate(
        bundle.model,
        batches,
        classes=get_classes(config),
        preprocessing=bundle.manifest.preprocessing,
        loss=SegmentationLoss(config.loss, PET_CLASSES.ignore_index),
        precision="fp32",
    )
    recorded = bundle.manifest.metrics["val_loss"]
    assert compute_loss(counts, SegmentationLoss(config.loss, PET_CLASSES.ignore_index)) == pytest.approx(
        recorded, 1e-3
    )
    assert compute_scores(counts)["val_mean_iou"] == pytest.approx(bundle.manifest.metrics["val_mean_iou"], abs=1e-3)


def test_validation_counts_every_pixel_once(uninterrupted_run: Path) -> None:
    confusion = load_bundle(str(uninterrupted_run / "bundle")).manifest.metrics["val_confusion"]
    assert sum(map(sum, confusion)) == NUM_TEST * SHAPE_SIZE**2


def test_rerunning_a_complete_run_changes_no_file(uninterrupted_run: Path, make_train_config: MakeConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted_run.rglob("*")}
    assert "nothing to do" in train(make_config(make_train_config, uninterrupted_run))
    assert {path: path.stat().st_mtime_ns for path in uninterrupted_run.rglob("*")} == before


def test_another_configuration_in_the_same_output_is_an_error(
    uninterrupted_run: Path, make_train_config: MakeConfig
) -> None:
    with pytest.raises(RunMismatchError, match=r"train\.learning_rate: the run has 0\.001, got 0\.5.*another output"):
        train(make_config(make_train_config, uninterrupted_run, learning_rate=0.5))


def test_weights_are_identical_after_a_worker_and_then_the_driver_are_killed_mid_epoch(
    uninterrupted_run: Path, make_train_config: MakeConfig, tmp_path: Path
) -> None:
    output, printed_file = tmp_path / "run", tmp_path / "printed.txt"
    config = make_config(make_train_config, output)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-u", "-c", "from segray.cli import main; main()", "train", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with printed_file.open("w") as file:
        driver = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        before = wait_for_mid_epoch(output, driver)
        find_workers(TRAIN_WORKER, driver.pid)[-1].kill()
        wait_for_mid_epoch(output, driver, before)
    finally:  # Even if the test fails: a driver left alive would disturb the next test.
        driver.kill()
        driver.wait()
    assert "resuming after " in printed_file.read_text()
    assert not (output / "bundle").exists()
    # If the driver dies while Ray Train writes its list of checkpoints, the list can be empty; Ray then never resumes.
    (output / "ray_train" / "checkpoint_manager_snapshot.json").write_text("")
    printed = train(config)
    assert "resuming after " in printed, printed
    assert read_weights_sha256(output) == read_weights_sha256(uninterrupted_run)
    assert read_metrics(output) == read_metrics(uninterrupted_run)
