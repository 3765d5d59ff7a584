"""When training is complete."""

from typing import Any

from segray.config import TrainSettings
from segray.training.job import is_finished


def make_history(*scores: float | None) -> list[dict[str, Any]]:
    return [
        {"epoch": number, **({} if score is None else {"val_mean_iou": score})}
        for number, score in enumerate(scores, start=1)
    ]


def test_a_run_is_finished_after_its_last_epoch() -> None:
    settings = TrainSettings(num_epochs=3)
    assert not is_finished(make_history(0.5, 0.1), settings)
    assert is_finished(make_history(0.5, 0.1, 0.1), settings)


def test_early_stopping_applies_after_the_configured_epochs_without_a_higher_score() -> None:
    settings = TrainSettings(num_epochs=9, early_stopping_epochs=2)
    assert not is_finished(make_history(0.1, 0.5, 0.4), settings)
    assert is_finished(make_history(0.1, 0.5, 0.4, 0.5), settings)  # An equal score is not higher.
    assert not is_finished(make_history(0.1, 0.5, 0.4, 0.6), settings)
    assert not is_finished(make_history(None, None, None), settings)  # Nothing was evaluated yet.
    assert not is_finished(make_history(0.5, None, None), settings)  # The next evaluation may be higher.
    assert is_finished(make_history(0.5, None, None, 0.4), settings)
    assert not is_finished(make_history(), settings)
