"""Entry point of a training worker. Light to import: Ray's controller imports it too, and needs no models."""

from typing import Any

from segray.training.job import TrainJob


def train_loop_per_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Run the training loop on the job in ``loop_config["job"]``; returns what the loop returns."""
    from segray.training.worker.loop import run_loop

    job: TrainJob = loop_config["job"]
    return run_loop(job)
