"""Which runs with a bundle are complete, and which go on."""

from types import SimpleNamespace
from typing import Any

import pytest

from segray.config import TrainSettings
from segray.errors import TrainingError
from segray.training import driver


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
