"""The driver without Ray: its stages run in the test process, one fragment after another."""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from segray.errors import TooManyErrorRows
from segray.progress import build_quiet_console
from segray.results.status import read_status
from segray.runtime.capacity import Capacity
from segray.segmentation import driver
from segray.segmentation.driver import print_outcome, require_few_errors, run_segmentation
from segray.segmentation.job import PipelineJob, SegmentJob
from segray.segmentation.stages.decode import FragmentDecoder
from segray.segmentation.stages.ledger import DECODE, PREDICT
from segray.segmentation.stages.placement import Placement
from segray.segmentation.stages.predictor import FragmentPredictor
from segray.segmentation.stages.writer import FragmentWriter
from tests.segmentation.local_ledger import LocalLedger
from tests.segmented import NUM_IMAGES, SETTINGS, read_rows


def run_in_process(
    fragments: Sequence[int], job: PipelineJob, placement: Placement, replaced: frozenset[int]
) -> Iterator[dict[str, Any]]:
    """Run the stages one after the other; replaces ``run_pipeline``."""
    decode = FragmentDecoder(job, LocalLedger(DECODE))
    predict = FragmentPredictor(job, placement.num_per_node, LocalLedger(PREDICT))
    write = FragmentWriter(job, replaced)
    for fragment in fragments:
        yield write(predict(decode(pa.table({"fragment": [fragment]})))).to_pylist()[0]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = Capacity(({"CPU": 4, "memory": 2**34},))
    monkeypatch.setattr(driver, "connect_ray", lambda *_: nullcontext())
    monkeypatch.setattr(driver, "reported_shortage", lambda _: nullcontext())
    monkeypatch.setattr(driver, "find_capacity", lambda: capacity)
    monkeypatch.setattr("segray.segmentation.stages.pipeline.run_pipeline", run_in_process)
    monkeypatch.setattr("segray.segmentation.stages.predictor.skip_exit_handlers", lambda: None)


@pytest.fixture
def job(bundle_dir: Path, bucket: Path, tmp_path: Path) -> SegmentJob:
    return SegmentJob(
        str(bundle_dir), (str(bucket / "images"),), str(tmp_path / "run"), (str(bucket / "masks"),), SETTINGS
    )


@pytest.mark.usefixtures("without_ray")
def test_a_quiet_console_prints_nothing(job: SegmentJob, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = run_segmentation(job, build_quiet_console(), with_profile=True)
    assert (outcome.num_ok, outcome.errors) == (NUM_IMAGES, {})
    assert run_segmentation(job, Console(quiet=True, force_terminal=True)).summary.equals(outcome.summary)
    assert capfd.readouterr() == ("", "")
    assert len(read_rows(Path(job.output_uri))) == NUM_IMAGES
    status = read_status(job.output_uri)
    assert (status.state, status.num_done, status.num_fragments_done) == ("complete", NUM_IMAGES, 3)
    assert json.loads((Path(job.output_uri) / "run.json").read_text())["counts"]["ok"] == NUM_IMAGES


@pytest.mark.usefixtures("without_ray")
def test_a_run_folder_without_a_format_version_is_resumed(job: SegmentJob) -> None:
    outcome = run_segmentation(job, build_quiet_console())
    path = Path(job.output_uri) / "run.json"
    content = json.loads(path.read_text())
    assert content.pop("format_version") == 1
    path.write_text(json.dumps(content))
    assert run_segmentation(job, build_quiet_console()).num_ok == outcome.num_ok
    assert json.loads(path.read_text()) == content  # A complete run is not written again.
    (path.parent / "images" / "part-00000001.parquet").unlink()
    assert run_segmentation(job, build_quiet_console()).num_ok == outcome.num_ok
    assert json.loads(path.read_text()) == {**content, "format_version": 1}


@pytest.mark.usefixtures("without_ray")
def test_the_outcome_is_printed_and_too_many_error_rows_are_an_error(
    job: SegmentJob, bucket: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "good.png").write_bytes((bucket / "images" / "image 0#.png").read_bytes())
    (tmp_path / "images" / "empty.png").touch()
    job = SegmentJob(job.bundle_uri, (str(tmp_path / "images"),), job.output_uri, (), SETTINGS)
    outcome = run_segmentation(job, build_quiet_console())
    printed = io.StringIO()
    print_outcome(outcome, Console(file=printed, width=200))
    assert "1 images segmented, 1 error rows (1 unreadable)" in printed.getvalue()
    with pytest.raises(TooManyErrorRows, match=r"1 of 2 images are error rows \(50\.0%\), the limit is 1\.0%"):
        require_few_errors(outcome, SETTINGS)
    require_few_errors(outcome, SETTINGS.model_copy(update={"max_error_fraction": 0.6}))
