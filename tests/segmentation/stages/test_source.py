"""The source of the pipeline: one block per fragment, produced as they are needed."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import get_backpressure_policies
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
from ray.data._internal.execution.operators.map_operator import MapOperator
from ray.data._internal.output_buffer import BlockOutputBuffer, OutputBlockSizeOption

from segray.segmentation.stages import source
from segray.segmentation.stages.source import FragmentSource, QueueLimit, build_source, limit_queues


def test_every_fragment_is_a_block_in_ascending_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_MAX_WAITING", 4)
    fragments = [number for number in range(15) if number != 7]
    tasks = FragmentSource(fragments).get_read_tasks(1)
    assert [task.metadata.num_rows for task in tasks] == [4, 4, 4, 2]
    blocks = [block for task in tasks for block in task()]
    assert [block["fragment"].to_pylist() for block in blocks] == [[number] for number in fragments]
    assert all(block.schema == task.schema for task in tasks for block in task())


def test_blocks_are_not_merged_or_split_whatever_their_size() -> None:
    """Ray passes the blocks of a task through this buffer."""
    context = DataContext()
    limit_queues(context)
    buffer = BlockOutputBuffer(OutputBlockSizeOption.of(target_max_block_size=context.target_max_block_size))
    tables = [pa.table({"row": pa.array([b"x" * size], pa.large_binary())}) for size in (1, 10**7, 3)]
    blocks = []
    for table in tables:
        buffer.add_block(table)
        blocks += buffer.iter_ready_blocks()
    buffer.finalize()
    assert [block.num_rows for block in [*blocks, *buffer.iter_ready_blocks()]] == [1, 1, 1]


def make_policy(operator: Any, num_waiting: int) -> QueueLimit:
    topology = {operator: SimpleNamespace(output_queue=SimpleNamespace(num_blocks=num_waiting))}
    return QueueLimit(DataContext(), topology, mock.Mock())


def test_a_stage_pauses_while_a_thousand_of_its_blocks_wait() -> None:
    stage, inputs = mock.Mock(spec=MapOperator), mock.Mock(spec=InputDataBuffer)
    free, full = make_policy(stage, 999), make_policy(stage, 1000)
    assert (free.can_add_input(stage), free.max_task_output_bytes_to_read(stage)) == (True, None)
    assert (full.can_add_input(stage), full.max_task_output_bytes_to_read(stage)) == (False, 0)
    assert make_policy(inputs, 1000).can_add_input(inputs)


def test_ray_data_uses_the_limit_beside_its_own_policies() -> None:
    context = DataContext()
    num_policies = len(get_backpressure_policies(context, {}, mock.Mock()))
    limit_queues(context)
    policies = get_backpressure_policies(context, {}, mock.Mock())
    assert (len(policies), type(policies[-1])) == (num_policies + 1, QueueLimit)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("limit", [1, 3, 100])
def test_ray_data_yields_each_fragment_as_one_block(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(source, "_MAX_WAITING", limit)
    limit_queues(DataContext.get_current())
    blocks = build_source(range(2, 22)).map_batches(lambda table: table, batch_size=1, batch_format="pyarrow")
    refs = list(blocks.iter_internal_ref_bundles())
    assert [bundle.num_rows() for bundle in refs] == [1] * 20
    assert sorted(row["fragment"] for row in blocks.iter_rows()) == list(range(2, 22))
