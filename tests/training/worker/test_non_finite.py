"""The end of a run whose steps are skipped again and again, and its error message."""

import math
from types import SimpleNamespace

import pytest

from segray.config import TrainSettings
from segray.data.sample_list import Sample
from segray.training.worker.non_finite import (
    MAX_SKIPPED_STEPS,
    NonFiniteLossError,
    check_result,
    count_skipped,
    explain_non_finite_loss,
)


@pytest.mark.parametrize(
    ("loss", "gradient_norm", "message"),
    [(math.nan, 1.0, "loss is nan"), (0.5, math.inf, "the gradient norm is inf"), (math.inf, math.nan, "loss is inf")],
)
def test_a_result_that_is_not_finite_is_skipped_or_ends_the_run(
    loss: float, gradient_norm: float, message: str
) -> None:
    assert math.isnan(check_result(loss, gradient_norm, may_skip=True))
    with pytest.raises(NonFiniteLossError, match=f"^{message}$"):
        check_result(loss, gradient_norm, may_skip=False)
    assert check_result(0.5, 2.0, may_skip=False) == check_result(0.5, 2.0, may_skip=True) == 0.5


def test_a_step_that_is_not_skipped_starts_the_count_again() -> None:
    num_skipped = 0
    for loss in [math.nan] * (MAX_SKIPPED_STEPS - 1) + [0.5]:
        num_skipped = count_skipped(num_skipped, loss)
    assert num_skipped == 0
    assert count_skipped(0, math.nan) == 1


def test_many_skipped_steps_in_a_row_end_the_run() -> None:
    with pytest.raises(NonFiniteLossError, match=f"not finite in {MAX_SKIPPED_STEPS} steps of fp16 in a row"):
        count_skipped(MAX_SKIPPED_STEPS - 1, math.nan)


def explain(global_batch_size: int) -> str:
    settings = TrainSettings(global_batch_size=global_batch_size)
    splits = SimpleNamespace(train=[Sample("a.png", "a"), Sample("b.png", "b")])
    job = SimpleNamespace(config=SimpleNamespace(train=settings), splits=splits, image_weights=None)
    return str(explain_non_finite_loss(job, 4, NonFiniteLossError("loss is nan")))  # type: ignore[arg-type]


def test_the_error_names_the_images_and_only_advises_what_a_rerun_accepts() -> None:
    message = explain(2)
    assert message.startswith("loss is nan at step 5 (the weights were not updated); to go on from the newest")
    assert "rerun with a lower train.max_gradient_norm (now null), or with train.precision: fp32 (now bf16)" in message
    assert "train.learning_rate (0.001) and choose another output" in message
    assert sorted(message.rpartition(": ")[2].split(", ")) == ["a.png", "b.png"]


def test_the_error_names_at_most_twenty_images() -> None:
    assert explain(20).count(".png") == explain(1024).count(".png") == 20
    assert explain(20).endswith(".png")
    assert explain(1024).endswith(".png and 1,004 more")
