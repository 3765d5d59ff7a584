"""Plan, decode, predict, write: the four stages as one Ray Data pipeline, a fragment being one row all the way.

A row cannot be split or merged by any stage (``batch_size=1``). A stage holds one fragment at a time: its images at the
model's input size, and masks and truth at the images' own; smaller fragments (``segment.fragment_size``) need less.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError

from segray.config import SegmentSettings
from segray.errors import ClusterError
from segray.models.bundle import BundleManifest
from segray.runtime.connect import translated_ray_errors
from segray.segmentation.stages.decode import FragmentDecoder
from segray.segmentation.stages.ledger import DECODE, PREDICT, LedgerClient, start_ledger
from segray.segmentation.stages.placement import Placement
from segray.segmentation.stages.predictor import FragmentPredictor
from segray.segmentation.stages.writer import FragmentWriter

# The ledger says when to stop, for it knows whether there is any progress; this is for what dies before it can ask.
_AGAIN = 100
_MAX_WRITES = 10  # a writer holds no image that could kill it
_ONE_FRAGMENT: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}


def run_pipeline(
    fragments: Sequence[int],
    *,
    replaced: frozenset[int],
    output_uri: str,
    cut_sha256: str,
    bundle_uri: str,
    bundle_sha256: str,
    manifest: BundleManifest,
    settings: SegmentSettings,
    placement: Placement,
    has_truth: bool,
) -> Iterator[dict[str, Any]]:
    """Make the given fragments of a planned run; yield a row of ``WRITTEN_SCHEMA`` as each is written.

    Raises:
        ClusterError: Nothing has moved for half an hour.
        SegrayError: What a stage raised; fragments that were written stay, and need not be made again.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False  # segray shows its own
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # importing it has set it to INFO; errors are raised too
    # 2.60 deprecates max_retries, max_restarts and max_task_retries here, and has nothing in their place yet
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    context.target_max_block_size = None  # a fragment is never cut
    # by default half of the CPUs is dealt out to the stages in equal parts, and what writing leaves nobody else may use
    context.op_resource_reservation_ratio = 0.1
    context.raise_original_map_exception = True  # else only the text of a stage's error arrives here
    with translated_ray_errors("segmenting"):
        classes = manifest.classes
        ledger = start_ledger(placement.num_predictors)
        decode = FragmentDecoder(
            output_uri,
            cut_sha256,
            classes,
            manifest.image_size,
            settings,
            has_truth,
            LedgerClient(DECODE, ledger),
        )
        tasks = TaskPoolStrategy(size=placement.num_tasks)
        write = FragmentWriter(output_uri, classes, settings.mask_encoding, replaced)
        written = (
            ray.data.from_items([{"fragment": fragment} for fragment in fragments], override_num_blocks=len(fragments))
            .map_batches(decode, **_ONE_FRAGMENT, compute=tasks, num_cpus=placement.decode_cpus, max_retries=_AGAIN)
            .map_batches(
                FragmentPredictor,
                **_ONE_FRAGMENT,
                fn_constructor_args=(
                    bundle_uri,
                    bundle_sha256,
                    settings,
                    placement.num_per_node,
                    LedgerClient(PREDICT, ledger),
                ),
                compute=ActorPoolStrategy(size=placement.num_predictors),
                num_cpus=placement.needs["CPU"],
                num_gpus=placement.needs.get("GPU", 0),
                max_restarts=_AGAIN,
                max_task_retries=_AGAIN,
            )
            .map_batches(write, **_ONE_FRAGMENT, compute=tasks, num_cpus=placement.write_cpus, max_retries=_MAX_WRITES)
        )
        try:
            yield from written.iter_rows()
        except ExecutionTimeoutError as error:
            raise ClusterError(
                f"nothing has moved for {context.execution_no_progress_timeout_s / 60:.0f} minutes: the cluster has no "
                "room, or a process hangs; `ray status` says which, and the same call goes on"
            ) from error
