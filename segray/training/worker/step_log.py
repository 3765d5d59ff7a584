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

    def record(self, result: torch.Tensor) -> None:
        """Post the step that has just been done, if it is due; ``result`` is what ``train_step`` returned."""
        trainer, step = self._trainer, self._trainer.num_steps_done
        if self._every is None or trainer.poster is None or step % self._every:
            return
        loss, norm = result.tolist()  # This waits for the step.
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        now_s = time.perf_counter()
        num_images = (step - self._last[0]) * trainer.job.config.train.global_batch_size
        row = {
            "step": step,
            "epoch": len(trainer.history) + 1,
            "loss": loss if is_finite else None,  # A skipped step has no loss.
            "learning_rate": trainer.learning_rate,
            "gradient_norm": norm if math.isfinite(norm) else None,
            "images_per_s": num_images / (now_s - self._last[1]),
        }
        self._last = (step, now_s)
        trainer.poster.post_step(row)
