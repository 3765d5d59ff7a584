"""A driver without Ray: its stages run in the test process, one fragment after another."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from segray.segmentation.job import PipelineJob, SegmentJob
    from segray.segmentation.stages.placement import Placement


def run_in_process(
    fragments: Sequence[int], job: "PipelineJob", placement: "Placement", replaced: frozenset[int]
) -> Iterator[dict[str, Any]]:
    """Run the stages one after the other; replaces ``run_pipeline``."""
    import pyarrow as pa

    from segray.segmentation.stages.decode import FragmentDecoder
    from segray.segmentation.stages.ledger import DECODE, PREDICT
    from segray.segmentation.stages.predictor import FragmentPredictor
    from segray.segmentation.stages.writer import FragmentWriter
    from tests.segmentation.local_ledger import LocalLedger

    decode = FragmentDecoder(job, LocalLedger(DECODE))
    predict = FragmentPredictor(job, LocalLedger(PREDICT))
    write = FragmentWriter(job, replaced)
    for fragment in fragments:
        yield write(predict(decode(pa.table({"fragment": [fragment]})))).to_pylist()[0]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    from segray.runtime.capacity import Capacity
    from segray.segmentation import driver

    capacity = Capacity(({"CPU": 4, "memory": 2**34},))
    monkeypatch.setattr(driver, "connect_ray", lambda *_: nullcontext())
    monkeypatch.setattr(driver, "reported_shortage", lambda _: nullcontext())
    monkeypatch.setattr(driver, "find_capacity", lambda: capacity)
    monkeypatch.setattr("segray.segmentation.stages.pipeline.run_pipeline", run_in_process)
    monkeypatch.setattr("segray.segmentation.stages.predictor.skip_exit_handlers", lambda: None)


@pytest.fixture
def job(bundle_dir: Path, bucket: Path, tmp_path: Path) -> "SegmentJob":
    """A job over ``bucket`` with ground truth."""
    from segray.segmentation.job import SegmentJob
    from tests.segmented import SETTINGS

    return SegmentJob(
        str(bundle_dir), (str(bucket / "images"),), str(tmp_path / "run"), (str(bucket / "masks"),), SETTINGS
    )
