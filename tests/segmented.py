"""Fixtures of segmentation tests: a bucket of labelled images of different sizes, and its complete run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet as pq

from segray.config import SegmentSettings
from segray.models.bundle import load_manifest
from segray.progress import build_quiet_console
from segray.segmentation.driver import run_segmentation
from segray.segmentation.job import PipelineJob, SegmentJob, SegmentResult

NUM_IMAGES = 10
SETTINGS = SegmentSettings(fragment_size=4, batch_size=3, precision="fp32", num_predictors=1)


def segment(
    bundle: Path, bucket: Path, output: Path, *, masks: bool = True, settings: SegmentSettings = SETTINGS
) -> SegmentResult:
    """Segment a bucket in this process, on the connected Ray."""
    mask_uris = (str(bucket / "masks"),) if masks else ()
    job = SegmentJob(str(bundle), (str(bucket / "images"),), str(output), mask_uris, settings)
    return run_segmentation(job, build_quiet_console())


def make_pipeline_job(bundle: Path, settings: SegmentSettings = SETTINGS) -> PipelineJob:
    """Return a job for a predictor alone: without a run folder or ground truth."""
    manifest, sha256 = load_manifest(str(bundle))
    return PipelineJob("", "", str(bundle), sha256, manifest.classes, manifest.image_size, settings, has_truth=False)


def read_rows(output: Path) -> list[dict[str, Any]]:
    """Return the rows of a run, sorted by URI."""
    rows = [row for path in sorted(output.glob("images/*.parquet")) for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: str(row["uri"]))


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of different sizes in two folders, and masks with ignored pixels and an absent class."""
    root = tmp_path_factory.mktemp("bucket")
    rng = np.random.default_rng(5)
    for index in range(NUM_IMAGES):
        size = (40 + 7 * index, 50 + 5 * index)
        name = f"{'sub/' if index % 2 else ''}image {index}#"
        for kind, pixels in (
            ("images", rng.integers(0, 256, (*size, 3), np.uint8)),
            ("masks", rng.choice([0, 1, 2], size).astype(np.uint8)),  # 0 is ignored; no pixel has class border (3)
        ):
            path = root / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="session")
def finished(bundle_dir: Path, bucket: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """The folder of a complete run over ``bucket``; tests must not modify it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    segment(bundle_dir, bucket, output)
    return output
