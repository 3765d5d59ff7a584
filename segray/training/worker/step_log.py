"""Post the loss, the learning rate and the speed every few steps, for ``steps.csv`` and the trackers."""

import math
import time

import torch

from segray.training.worker.state import Trainer


class StepLog:
    """Posts every ``train.log_every_steps`` steps, from rank 0; other ranks do nothing.

    The values are those of the step itself, and the speed is the mean since the last post. Only here does the host wait
    for a step, because it reads the loss.

    Args:
        trainer: At the start of an epoch, or where a run resumes.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._every = trainer.job.config.train.log_every_steps
        self._last = (trainer.num_steps_done, time.perf_counter())

    def record(self, loss: float | torch.Tensor) -> None:
        """Post the step that has just been done, if it is due; ``loss`` is NaN for a skipped step."""
        trainer, step = self._trainer, self._trainer.num_steps_done
        if self._every is None or trainer.poster is None or step % self._every:
            return
        value = _to_nullable(loss)  # This waits for the step.
        now_s = time.perf_counter()
        num_images = (step - self._last[0]) * trainer.job.config.train.global_batch_size
        norm = trainer.learner.diagnostics.get("gradient_norm")
        row = {
            "step": step,
            "epoch": len(trainer.history) + 1,
            "loss": value,
            "learning_rate": trainer.learning_rate,
            "gradient_norm": None if norm is None else _to_nullable(norm),
            "images_per_s": num_images / (now_s - self._last[1]),
        }
        self._last = (step, now_s)
        trainer.poster.post_step(row)


def _to_nullable(value: float | torch.Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
