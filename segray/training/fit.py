"""Run the training workers with Ray Train, and convert their failures to segray errors."""

import os
from dataclasses import replace
from typing import Any

import ray
import ray.train
import ray.train.torch
from pyarrow.fs import FileSystem
from ray.train import TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    CHECKPOINT_MANAGER_SNAPSHOT_FILENAME,
    WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR,
)
from rich.console import Console

from segray.errors import SegrayError, TrainingError
from segray.runtime.failures import describe_cause, find_segray_error, translated_ray_errors
from segray.storage import join_uri, remove_file
from segray.storage.arrow import open_filesystem
from segray.training.checkpoint import RUN_NAME, remove_surplus
from segray.training.job import TrainJob
from segray.training.placement import get_worker_needs, place_on_cluster
from segray.training.progress_board import TrackEpochs, TrackSteps, show_training
from segray.training.worker.entry import train_loop_per_worker

# Timeouts of Ray and torch, relative to the stall timeout. They are longer so that segray reports a stalled worker
# first: Ray and torch would stop the workers without saying where each of them was.
_TIMEOUT_FACTOR = 2
_MAX_SHOWN_FAILURES = 3


def fit(
    job: TrainJob, output: str, console: Console, track: TrackEpochs, track_steps: TrackSteps = lambda rows: None
) -> dict[str, float]:
    """Train from the newest intact checkpoint under ``output``, if any, to the last epoch. Ray must be connected.

    Args:
        job: The job description; its ``board`` is set here.
        output: URI of the output folder, under which Ray Train keeps the checkpoints.
        console: Where progress is shown.
        track: Called with the metrics of new epochs; returns whether training may continue, which only jobs with
            ``pauses_after_epoch`` take into account.
        track_steps: Called with new rows of ``steps.csv``.

    Returns:
        What was measured if the job ``only_measures``, else an empty dict.

    Raises:
        ClusterError: The cluster can never run the workers.
        TrainingError: The loss is not finite, workers failed more often than allowed, or a worker stalled.
        SegrayError: Any other segray error that a worker raised.
    """
    settings = job.config.train
    filesystem, storage_path = open_filesystem(output)
    # Ray Train's own list of checkpoints makes a run fail if the driver died while writing it, if it names a folder
    # that was removed, or if another Ray cluster wrote it. Workers find checkpoints by listing the folder, so the list
    # is removed, and Ray starts a new one each time.
    remove_file(join_uri(job.run_uri, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME))
    remove_surplus(job.run_uri, settings.num_best_checkpoints)
    os.environ[WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR] = str(_TIMEOUT_FACTOR * settings.stall_timeout_s)
    num_workers, _ = place_on_cluster(settings)
    with show_training(console, job.num_steps, settings.stall_timeout_s, track, track_steps) as board:
        trainer = _build_trainer(replace(job, board=board), num_workers, filesystem, storage_path)
        try:
            with translated_ray_errors("training"):
                result = trainer.fit()
        except TrainingFailedError as error:
            with translated_ray_errors("training"):
                diagnosis = ray.get(board.get_diagnosis.remote())
            raise _explain_failure(error, diagnosis, settings.max_failures) from error
    if result.return_value and result.return_value["error"]:
        raise result.return_value["error"]
    measured: dict[str, float] = (result.return_value or {}).get("measured", {})
    return measured


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray's trainer, without its placement group cleaner if Ray runs without a dashboard.

    The cleaner frees the workers' resources if the controller dies, and asks the dashboard for the controller's state.
    Without a dashboard it never gets an answer, and Ray waits 12 s for it at the end of every run (measured, Ray 2.60).
    A private Ray has no dashboard, and its resources end with the driver anyway.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        if ray._private.worker.get_dashboard_url():
            return callbacks
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def _build_trainer(job: TrainJob, num_workers: int, filesystem: FileSystem, storage_path: str) -> TorchTrainer:
    """Build the Ray trainer for at most ``num_workers`` workers, with checkpoints under ``storage_path``."""
    settings = job.config.train
    return _Trainer(
        train_loop_per_worker,
        # Ray sends this to the controller and to every worker. With the job itself instead of a reference, each of them
        # would have its own copy of the list of samples; like this, all workers of a node map a single one.
        train_loop_config={"job": ray.put(job)},
        torch_config=ray.train.torch.TorchConfig(timeout_s=_TIMEOUT_FACTOR * settings.stall_timeout_s),
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


def _explain_failure(error: TrainingFailedError, diagnosis: str | None, max_failures: int) -> SegrayError:
    """Return the error to raise if Ray Train failed: a worker's own error, a stall, or too many failures."""
    return (
        find_segray_error(error)
        or (TrainingError(diagnosis) if diagnosis else None)
        or TrainingError(
            f"workers failed more than {max_failures} times (train.max_failures); to resume from the newest "
            f"checkpoint, rerun the same command. Last failure: {_describe_failures(error)}"
        )
    )


def _describe_failures(error: TrainingFailedError) -> str:
    """Return rank and cause of the failed workers; one worker's failure often makes others fail."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    causes: dict[str, int] = {}
    for rank, failure in sorted(failures.items()):
        causes.setdefault(describe_cause(failure), rank)
    shown = [f"rank {rank}: {cause}" for cause, rank in causes.items()][:_MAX_SHOWN_FAILURES]
    return "; ".join(shown) or describe_cause(error)
