"""Count steps that were skipped because of fp16, and explain a loss that is not finite."""

import math

from segray.errors import TrainingError
from segray.training.job import TrainJob
from segray.training.worker.feed import compute_step_order

# The scaler starts at 2^16 and halves its factor at each skipped step, so after 17 in a row it is no longer the cause.
MAX_SKIPPED_STEPS = 20
SKIPPED = math.nan  # Stands for the loss of a step that was skipped in fp16.
_MAX_SHOWN = 20  # Images in a message.


class NonFiniteLossError(TrainingError):
    """Raised on all ranks if the loss or gradient of a step was not finite on any; it did not change the weights."""


def check_result(loss: float, gradient_norm: float, *, may_skip: bool) -> float:
    """Return the loss of a step, or ``SKIPPED``.

    Args:
        loss: The loss that ``train_step`` computed.
        gradient_norm: The norm of the gradient that it computed.
        may_skip: Whether a step may be skipped: in fp16.

    Raises:
        NonFiniteLossError: The loss or the norm is not finite, and no step may be skipped.
    """
    if math.isfinite(loss) and math.isfinite(gradient_norm):
        return loss
    if may_skip:
        return SKIPPED
    raise NonFiniteLossError(f"the gradient norm is {gradient_norm}" if math.isfinite(loss) else f"loss is {loss}")


def count_skipped(num_skipped: int, loss: float) -> int:
    """Return how many steps in a row were skipped, after one with this loss.

    Args:
        num_skipped: How many were skipped in a row before it.
        loss: The loss, or ``SKIPPED``.

    Raises:
        NonFiniteLossError: There were ``MAX_SKIPPED_STEPS`` in a row.
    """
    num_skipped = num_skipped + 1 if math.isnan(loss) else 0
    if num_skipped >= MAX_SKIPPED_STEPS:
        raise NonFiniteLossError(f"loss or gradient not finite in {num_skipped} steps of fp16 in a row, the last one")
    return num_skipped


def explain_non_finite_loss(job: TrainJob, step: int, error: NonFiniteLossError) -> NonFiniteLossError:
    """Return the error with the step, its images, and the settings that may help and that a rerun may change."""
    settings = job.config.train
    order = compute_step_order(
        step, len(job.splits.train), settings.global_batch_size, settings.seed, job.image_weights
    )
    uris = ", ".join(job.splits.train[index].image_uri for index in order[:_MAX_SHOWN])
    more = f" and {len(order) - _MAX_SHOWN:,} more" if len(order) > _MAX_SHOWN else ""
    fp32 = "" if settings.precision == "fp32" else f", or with train.precision: fp32 (now {settings.precision})"
    return NonFiniteLossError(
        f"{error} at step {step + 1} (the weights were not updated); to go on from the newest checkpoint, rerun with a "
        f"lower train.max_gradient_norm (now {settings.max_gradient_norm or 'null'}){fp32}; or lower "
        f"train.learning_rate ({settings.learning_rate}) and choose another output; or check the images of this step: "
        f"{uris}{more}"
    )
