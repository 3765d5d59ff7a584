"""What the driver checks before anything is read or started, and which runs with a bundle are complete."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from segray.config import TrainConfig, TrainSettings
from segray.data.sample_list import Sample, Splits
from segray.errors import ConfigError, DataError, TrainingError
from segray.training import driver
from segray.training.labels.split_report import SplitReport

MakeConfig = Callable[..., TrainConfig]


def change(config: TrainConfig, **settings: Any) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(mode="json"), **settings})


def test_segformers_own_encoders_pass(make_train_config: MakeConfig, tmp_path: Path) -> None:
    model = {"arch": "segformer", "encoder_name": "mit_b0"}
    driver.check_network(change(make_train_config(tmp_path), model=model))


def test_the_network_is_run_at_the_size_of_images_and_crops(make_train_config: MakeConfig, tmp_path: Path) -> None:
    config = change(make_train_config(tmp_path), model={"arch": "pan"})  # It needs at least 128 pixels.
    with pytest.raises(ConfigError, match=r"^image_size: .*64x64"):
        driver.check_network(config)
    config = change(config, image_size=[128, 128])
    driver.check_network(config)
    with pytest.raises(ConfigError, match=r"^augmentation\.crop_size: .*96x96"):
        driver.check_network(change(config, augmentation={"preset": "light", "crop_size": [96, 96]}))


def test_a_frozen_encoder_needs_weights(make_train_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.freeze_encoder: true needs pretrained weights"):
        driver.check_network(change(make_train_config(tmp_path), model={"freeze_encoder": True}))


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The history in the checkpoints of a run whose bundle was written after 3 epochs."""
    manifest = SimpleNamespace(metrics={"epoch": 2, "num_epochs": 3}, config={"train": {"num_epochs": 3}})
    history: list[dict[str, Any]] = [{"epoch": number, "val_mean_iou": 0.5} for number in (1, 2, 3)]
    monkeypatch.setattr(driver, "load_manifest", lambda uri: (manifest, ""))
    monkeypatch.setattr(driver, "find_newest_history", lambda uri: history)
    return history


def is_complete(**settings: Any) -> bool:
    return driver.is_complete(TrainSettings(**settings), "out/bundle", "out/ray_train")


def test_a_finished_run_goes_on_only_if_it_has_more_epochs(checkpoints: list[dict[str, Any]]) -> None:
    assert is_complete(num_epochs=3)
    assert is_complete(num_epochs=2)
    assert not is_complete(num_epochs=4)
    assert is_complete(num_epochs=4, early_stopping_epochs=1)


def test_a_bundle_older_than_the_newest_checkpoint_is_not_complete(checkpoints: list[dict[str, Any]]) -> None:
    checkpoints.append({"epoch": 4, "val_mean_iou": 0.6})
    assert not is_complete(num_epochs=4)


def test_more_epochs_without_checkpoints_are_an_error(checkpoints: list[dict[str, Any]]) -> None:
    checkpoints.clear()
    assert is_complete(num_epochs=3)
    with pytest.raises(
        TrainingError, match=r"train\.num_epochs: .* after 3 epochs, got 9, .*out/ray_train were removed"
    ):
        is_complete(num_epochs=9)


def test_a_run_does_not_end_at_an_epoch_that_was_not_evaluated(checkpoints: list[dict[str, Any]]) -> None:
    del checkpoints[2]["val_mean_iou"]
    with pytest.raises(ConfigError, match=r"^train\.num_epochs: .* the 3 epochs .* got 3; set at least 4$"):
        driver.require_evaluated(TrainSettings(num_epochs=3), "out/ray_train")
    driver.require_evaluated(TrainSettings(num_epochs=4), "out/ray_train")
    driver.require_evaluated(TrainSettings(num_epochs=2), "out/ray_train")  # The scores of epoch 2 are kept.


@pytest.fixture
def num_checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of labels of each check, which counts one pixel of each class."""
    checks: list[int] = []

    def check(config: TrainConfig, splits: Splits, console: Console) -> dict[str, SplitReport]:
        checks.append(len(splits.train))
        report = SplitReport.empty(len(config.data.class_names))
        return dict.fromkeys(("train", "val"), replace(report, num_samples=1, pixel_count=report.pixel_count + 1))

    monkeypatch.setattr(driver, "check_splits", check)
    return checks


def test_labels_are_checked_again_only_if_the_listing_changes_or_on_request(
    make_train_config: MakeConfig,
    console: Console,
    capsys: pytest.CaptureFixture[str],
    num_checks: list[int],
    tmp_path: Path,
) -> None:
    config = make_train_config(tmp_path)
    a, b = Sample("a", "b"), Sample("b", "c")
    counts = [driver.check_run(config, Splits([a], [b]), console).pixel_count.tolist() for _ in range(3)]
    assert counts == [[1, 1, 1]] * 3
    assert num_checks == [1]
    assert capsys.readouterr().out.count("labels were checked on") == 2
    driver.check_run(make_train_config(tmp_path, recheck_labels=True), Splits([a], [b]), console)
    driver.check_run(config, Splits([a, b], [b]), console)
    assert num_checks == [1, 1, 2]


def test_a_check_that_finds_faults_removes_the_record_of_an_earlier_one(
    make_train_config: MakeConfig, console: Console, num_checks: list[int], tmp_path: Path
) -> None:
    config, splits = make_train_config(tmp_path), Splits([Sample("a", "b")], [])
    driver.check_run(config, splits, console)
    empty = {"train": SplitReport.empty(len(config.data.class_names))}
    with pytest.raises(DataError):
        driver.check_once(make_train_config(tmp_path, recheck_labels=True), "", lambda: empty, console)
    driver.check_run(config, splits, console)
    assert num_checks == [1, 1]
