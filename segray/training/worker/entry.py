"""Entry point of a training worker.

Ray Train's controller imports this module too, so it must not import any model code.
"""

from typing import Any

import ray

from segray.training.job import TrainJob


def train_loop_per_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Run the training loop for the job that ``loop_config["job"]`` refers to; return what ``run_loop`` returns."""
    from segray.training.worker.loop import run_loop
    from segray.training.worker.measure import measure_speed

    job: TrainJob = ray.get(loop_config["job"])
    return run_loop(job, measure_speed if job.only_measures else None)
