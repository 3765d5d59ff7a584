"""The Ray Data pipeline: plan, decode, predict and write, with one row per fragment through all stages.

No stage can split or merge rows (``batch_size=1``). A stage holds one fragment in memory at a time: its images at the
model's input size, and its masks and ground truth compressed. Smaller fragments need less memory
(``segment.fragment_px``).
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError

from segray.config import SegmentSettings
from segray.errors import ClusterError
from segray.runtime.failures import translated_ray_errors
from segray.segmentation.job import PipelineJob
from segray.segmentation.stages.decode import FragmentDecoder
from segray.segmentation.stages.ledger import DECODE, PREDICT
from segray.segmentation.stages.ledger_client import LedgerClient, start_ledger
from segray.segmentation.stages.placement import Placement
from segray.segmentation.stages.predictor import FragmentPredictor
from segray.segmentation.stages.source import build_source, limit_queues
from segray.segmentation.stages.writer import FragmentWriter

# The ledger decides when to give up, because it knows whether there is progress. This limit is for processes that die
# before they reach the ledger. A fragment may contain many images that kill their worker, four times each.
_MAX_RETRIES = 1000
_TIMEOUT_FACTOR = 1.5
_MAX_WRITE_RETRIES = 10  # Fewer: a writer decodes no images, so no image can crash it.
_ONE_FRAGMENT: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}


def run_pipeline(
    fragments: Sequence[int], job: PipelineJob, placement: Placement, replaced: frozenset[int] = frozenset()
) -> Iterator[dict[str, Any]]:
    """Process the given fragments of a planned run; yield a row of ``WRITTEN_SCHEMA`` as each is written.

    Args:
        fragments: Numbers of the fragments.
        job: What the stages share.
        placement: Number and resources of the processes of each stage.
        replaced: Fragments whose existing file is to be overwritten.

    Raises:
        ClusterError: There was no progress for a long time.
        SegrayError: Raised by a stage. Fragments that are already written stay, and are not processed again.
    """
    context = _configure_ray_data(job.settings)
    with translated_ray_errors("segmenting"):
        ledger = start_ledger(placement.num_predictors, job.settings.image_timeout_s)
        remaining = dict.fromkeys(fragments)
        while True:
            try:
                for written in _build_dataset(list(remaining), job, placement, replaced, ledger).iter_rows():
                    remaining.pop(written["fragment"], None)
                    yield written
                return
            except ExecutionTimeoutError as error:
                # Ray sees only finished fragments. The ledger sees images, and many slow ones may be in one fragment.
                if not ray.get(ledger.abandon_attempts.remote()):
                    raise ClusterError(
                        f"no progress for {context.execution_no_progress_timeout_s / 60:.0f} minutes: the cluster has "
                        "no free resources, or a process hangs; check `ray status`; to resume, rerun the same command"
                    ) from error


def _configure_ray_data(settings: SegmentSettings) -> DataContext:
    """Set Ray Data's options for this process, and return them."""
    context = DataContext.get_current()
    if context.execution_no_progress_timeout_s > 0:  # Half an hour by default, but longer than a batch may take.
        longest_s = _TIMEOUT_FACTOR * settings.image_timeout_s * settings.batch_size
        context.execution_no_progress_timeout_s = max(context.execution_no_progress_timeout_s, longest_s)
    context.enable_progress_bars = False  # segray shows its own progress bar.
    # Importing ray.data sets the level to INFO. Errors are raised, so nothing is lost by not logging them.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # Ray 2.60 deprecates max_retries, max_restarts and max_task_retries here, but has no replacement yet.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    limit_queues(context)
    # By default, half of the CPUs are reserved for the stages in equal parts. The writers need less than their part,
    # and the rest of it would stay idle.
    context.op_resource_reservation_ratio = 0.1
    context.raise_original_map_exception = True  # Otherwise only the text of a stage's exception reaches the driver.
    return context


def _build_dataset(
    fragments: Sequence[int], job: PipelineJob, placement: Placement, replaced: frozenset[int], ledger: Any
) -> Dataset:
    """Return the pipeline as a lazy dataset of ``WRITTEN_SCHEMA``; ``ledger`` is the handle of the ledger's actor."""
    decode = FragmentDecoder(job, LedgerClient(DECODE, ledger))
    write = FragmentWriter(job, replaced)
    tasks = TaskPoolStrategy(size=placement.num_tasks)
    return (
        build_source(fragments)
        .map_batches(decode, **_ONE_FRAGMENT, compute=tasks, num_cpus=placement.decode_cpus, max_retries=_MAX_RETRIES)
        .map_batches(
            FragmentPredictor,
            **_ONE_FRAGMENT,
            fn_constructor_args=(job, LedgerClient(PREDICT, ledger)),
            compute=ActorPoolStrategy(size=placement.num_predictors),
            num_cpus=placement.needs["CPU"],
            num_gpus=placement.needs.get("GPU", 0),
            max_restarts=_MAX_RETRIES,
            max_task_retries=_MAX_RETRIES,
        )
        .map_batches(
            write, **_ONE_FRAGMENT, compute=tasks, num_cpus=placement.write_cpus, max_retries=_MAX_WRITE_RETRIES
        )
    )
