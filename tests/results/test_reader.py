"""Class names of an opened run folder."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from segray.config import SegmentSettings
from segray.data.classes import ClassMap
from segray.errors import MissingFileError
from segray.results.reader import RunResults
from segray.results.summary import format_summary_parquet, summarize_run
from segray.runs.fragment_metadata import build_fragment_metadata
from segray.runs.plan import Plan
from segray.runs.run_file import RunFile, RunFingerprint
from segray.schema import IMAGES_SCHEMA
from tests.results.rows import make_row, save_fragment

CLASSES = ClassMap(("road", "sky", "Straße"), (1, 2, 4))
PLAN = Plan("a" * 64, "b" * 64, 1, 1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has no rows yet."""
    record = RunFile.start(RunFingerprint(bundle_sha256="c" * 64, config={}), PLAN, {}, SegmentSettings())
    (tmp_path / "run.json").write_bytes(record.format())
    return tmp_path


def test_class_names_are_read_from_the_rows(run: Path) -> None:
    (run / "images").mkdir()
    metadata = build_fragment_metadata(CLASSES, "c" * 64, SegmentSettings().bit_settings)
    rows = pa.Table.from_pylist([make_row("1", [1] * 3, [0] * 3, [0] * 3)], IMAGES_SCHEMA.with_metadata(metadata))
    pq.write_table(rows, run / "images" / "part-00000000.parquet", write_page_checksum=True)
    assert RunResults(str(run)).class_names == CLASSES.names
    stored = pq.read_schema(run / "images" / "part-00000000.parquet").metadata
    assert json.loads(stored[b"segray.class_names"]) == list(CLASSES.names)  # as documented


def test_class_names_of_a_run_of_an_early_version_are_read_from_its_summary(run: Path) -> None:
    save_fragment(run, 0, [make_row("1", [1] * 3, [0] * 3, [0] * 3)])
    (run / "summary.parquet").write_bytes(format_summary_parquet(summarize_run(str(run), PLAN, CLASSES).summary))
    assert RunResults(str(run)).class_names == CLASSES.names


def test_a_run_without_rows_has_no_class_names(run: Path) -> None:
    with pytest.raises(MissingFileError, match="the run is not complete, so it has no summary"):
        _ = RunResults(str(run)).class_names
