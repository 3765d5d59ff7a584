"""The source of the pipeline: the numbers of the fragments, one row and one block each.

Ray keeps an object for every block that waits in the driver. So in a large run, tasks produce the blocks during the
run, and no stage produces more when a thousand of its blocks wait for the next stage.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import DataContext, Dataset
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.operators.map_operator import MapOperator
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

_MAX_WAITING = 1000
_NUM_TASKS_AT_ONCE = 4  # A single one may be too slow for many predictors with short fragments.
_SCHEMA = pa.schema([("fragment", pa.int64())])


class QueueLimit(BackpressurePolicy):  # type: ignore[misc]
    """Ray Data policy that stops a stage while many of its blocks wait; Ray itself limits only their bytes."""

    def can_add_input(self, op: PhysicalOperator) -> bool:
        """Return whether a stage may start another task."""
        return not isinstance(op, MapOperator) or self._topology[op].output_queue.num_blocks < _MAX_WAITING

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        """Return 0 while the running tasks of a stage must not produce more blocks."""
        return None if self.can_add_input(op) else 0


class FragmentSource(Datasource):  # type: ignore[misc]
    """Ray Data source of fragments, in ascending order but for a few that are produced at the same time.

    Args:
        fragments: Numbers of the fragments.
    """

    def __init__(self, fragments: Sequence[int]) -> None:
        super().__init__()
        self._fragments = fragments

    def estimate_inmemory_data_size(self) -> None:
        """Return None: unknown to Ray Data, which would split the blocks by their size."""

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, **_: Any) -> list[ReadTask]:
        """Return tasks that yield one block per fragment."""
        return [
            _build_task(self._fragments[start : start + _MAX_WAITING], per_task_row_limit)
            for start in range(0, len(self._fragments), _MAX_WAITING)
        ]


def _build_task(fragments: Sequence[int], per_task_row_limit: int | None) -> ReadTask:
    def read() -> Iterator[pa.Table]:
        for fragment in fragments:
            yield pa.table({"fragment": [fragment]}, schema=_SCHEMA)

    metadata = BlockMetadata(num_rows=len(fragments), size_bytes=None, exec_stats=None, input_files=None)
    return ReadTask(read, metadata, _SCHEMA, per_task_row_limit)


def limit_queues(context: DataContext) -> None:
    """Make every row a block of its own, and limit the number of blocks that wait between stages."""
    # In bytes. A block is complete when it exceeds this size, so after one row. Rows cannot be split.
    context.target_max_block_size = 1
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, QueueLimit])


def build_source(fragments: Sequence[int]) -> Dataset:
    """Return the fragments as a lazy dataset with the column ``fragment``."""
    if len(fragments) <= _MAX_WAITING:  # No task is needed, whose process would take a second to start.
        return ray.data.from_items(
            [{"fragment": fragment} for fragment in fragments], override_num_blocks=len(fragments)
        )
    source = FragmentSource(fragments)
    num_tasks = len(source.get_read_tasks(1))
    return ray.data.read_datasource(
        source,
        override_num_blocks=num_tasks,
        num_cpus=0,  # It waits most of the time, and CPUs may be scarce: see placement.py.
        concurrency=min(num_tasks, _NUM_TASKS_AT_ONCE),
    )
