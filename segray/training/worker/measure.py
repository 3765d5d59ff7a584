"""Measure how long an epoch and an evaluation take, for a time budget; nothing that is computed is kept."""

import itertools
import time
from contextlib import closing
from dataclasses import replace

import torch
from torch import distributed

from segray.data.sample_list import Splits
from segray.training.worker.loop import evaluate_split, iterate_batches, read_results, train_steps
from segray.training.worker.state import Trainer

_NUM_WARM_UP = 3  # Steps in which kernels are compiled and chosen, and the first images are read.
_MAX_STEPS = 50
_SHARE = 0.05  # Of the time budget, for the measurement of steps.
_NUM_EVAL_BATCHES = 2  # Of each rank.


def measure_speed(trainer: Trainer) -> dict[str, float]:
    """Return ``s_per_epoch`` and ``s_per_evaluation``; collective. The trainer must not be used afterwards.

    The first steps read images that later epochs may find in the cache, so a run is rather faster than measured.
    """
    budget_min = trainer.job.config.train.time_budget_min
    assert budget_min is not None
    end = trainer.num_steps_done + _NUM_WARM_UP + _MAX_STEPS
    started_s = first_s = time.perf_counter()
    trainer.learner.replica.train()
    with closing(iterate_batches(trainer, end)) as batches:
        for number, _ in enumerate(train_steps(trainer, batches, end), start=1):
            read_results(trainer)  # Steps are only queued on a GPU; this waits for them.
            if number == _NUM_WARM_UP:
                started_s = time.perf_counter()
            is_over = time.perf_counter() - first_s > _SHARE * 60 * budget_min
            if number > _NUM_WARM_UP and _agree(trainer, is_over):
                break
        s_per_step = (time.perf_counter() - started_s) / (number - _NUM_WARM_UP)
    settings, val = trainer.job.config.train, trainer.job.splits.val
    some = list(itertools.islice(val, trainer.world_size * settings.eval_batch_size * _NUM_EVAL_BATCHES))
    started_s = time.perf_counter()
    evaluate_split(replace(trainer, job=replace(trainer.job, splits=Splits(trainer.job.splits.train, some))))
    s_per_image = (time.perf_counter() - started_s) / len(some)
    return {"s_per_epoch": s_per_step * trainer.job.steps_per_epoch, "s_per_evaluation": s_per_image * len(val)}


def _agree(trainer: Trainer, is_over: bool) -> bool:
    """Return whether rank 0 has used its time, the same on all ranks."""
    if not distributed.is_initialized():
        return is_over
    flag = torch.tensor(int(is_over), device=trainer.learner.device)
    distributed.broadcast(flag, src=0)
    return bool(flag.item())
