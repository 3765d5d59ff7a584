"""Ray Train's part: fit on the workers."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import TrainingFailedError
from ray.train.v2._internal.constants import (
    CHECKPOINT_MANAGER_SNAPSHOT_FILENAME,
    WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR,
)
from rich.console import Console

from segray.errors import TrainingError
from segray.runtime.connect import find_segray_error, get_last_line
from segray.storage import join_uri, remove_file
from segray.storage.arrow import open_filesystem
from segray.training.checkpoint import RUN_NAME, remove_surplus
from segray.training.job import TrainJob
from segray.training.placement import get_worker_needs, place_on_cluster
from segray.training.progress_board import show_training
from segray.training.worker.entry import train_loop_per_worker
from segray.training.worker.feed import compute_num_steps

_PATIENCE = 2  # times the stall timeout


def fit(job: TrainJob, output: str, console: Console, track: Callable[[list[dict[str, Any]]], bool]) -> None:
    """Train on a connected Ray, from the newest whole checkpoint under ``output`` to the last epoch.

    Args:
        job: What to train; its board is made here.
        output: Where checkpoints go.
        console: Where progress is shown.
        track: Called with the metrics of new epochs; returns whether training goes on, for jobs that wait for leave.

    Raises:
        ClusterError: There will never be room for the workers.
        TrainingError: The loss is not finite, workers were lost more often than allowed, or one of them stalled.
        SegrayError: What a worker raised.
    """
    settings = job.config.train
    filesystem, storage_path = open_filesystem(output)
    # Ray Train's list of its checkpoints stops a run if its driver died while writing it, if it names a folder that is
    # gone, or if another Ray wrote it. Workers find checkpoints by looking, so Ray starts a new list each time.
    remove_file(join_uri(job.run_uri, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME))
    remove_surplus(job.run_uri, settings.num_best_checkpoints)
    # a worker that stalls is ours to name: Ray and torch would give it up without a word of where it was
    os.environ[WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR] = str(_PATIENCE * settings.stall_timeout_s)
    num_steps = compute_num_steps(len(job.splits.train), settings.global_batch_size) * settings.num_epochs
    num_workers, _ = place_on_cluster(settings)
    with show_training(console, num_steps, settings.stall_timeout_s, track) as board:
        trainer = ray.train.torch.TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"job": replace(job, board=board)},
            torch_config=ray.train.torch.TorchConfig(timeout_s=_PATIENCE * settings.stall_timeout_s),
            scaling_config=ray.train.ScalingConfig(
                num_workers=(settings.min_train_workers, num_workers) if settings.min_train_workers else num_workers,
                use_gpu=settings.use_gpu,
                resources_per_worker=get_worker_needs(settings),
            ),
            run_config=ray.train.RunConfig(
                name=RUN_NAME,
                storage_path=storage_path,
                storage_filesystem=filesystem,
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            verdict = ray.get(board.get_verdict.remote())
            raise (
                find_segray_error(error)
                or (TrainingError(verdict) if verdict else None)
                or TrainingError(
                    f"training failed on its workers more than {settings.max_failures} times (train.max_failures); "
                    f"the same command goes on from the newest checkpoint. Last failure: {get_last_line(error)}"
                )
            ) from error
    if result.return_value and result.return_value["error"]:
        raise result.return_value["error"]
