"""``segray train`` and ``segray segment`` on a GPU that Ray assigns, with masks and scores compared with a CPU run."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from pyarrow import parquet as pq

from segray.data.synthetic import save_shapes
from tests.gpu.bundles import assert_same_where_clear, compute_logits
from tests.gpu.conftest import needs_cuda
from tests.gpu.one_rank import IMAGE_SIDE

pytestmark = [pytest.mark.gpu, needs_cuda]
ROOT = Path(__file__).parents[2]
NUM_TRAIN, NUM_TEST = 64, 24
TIMEOUT_S = 120


def run(*arguments: str) -> str:
    """Run a segray command; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "segray", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    save_shapes(str(root), NUM_TRAIN, NUM_TEST, IMAGE_SIDE)
    return root


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a run on one GPU."""
    output = tmp_path_factory.mktemp("trained")
    config = {
        "data": {"layout": {"oxford_iiit_pet": {"root": str(shapes)}}},
        "image_size": [IMAGE_SIDE, IMAGE_SIDE],
        "train": {"num_epochs": 10, "global_batch_size": 8, "use_gpu": True, "ema_decay": 0.9},
        "output": str(output),
    }
    (output / "config.yaml").write_text(yaml.safe_dump(config))
    printed = run("train", str(output / "config.yaml"))
    assert "epoch 10/10" in printed
    return output / "bundle"


def segment(bundle: Path, shapes: Path, output: Path, *settings: str) -> list[dict[str, Any]]:
    """Segment all images of the data set and return the rows, sorted by URI."""
    overrides = [part for one in ("segment.fragment_size=8", *settings) for part in ("--set", one)]
    run("segment", "--bundle", str(bundle), "--images", str(shapes / "images"), "--output", str(output), *overrides)
    rows = [row for path in sorted((output / "images").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [row["status"] for row in rows] == ["ok"] * (NUM_TRAIN + NUM_TEST)
    return sorted(rows, key=lambda row: str(row["uri"]))


def test_masks_equal_those_of_the_cpu_and_shared_gpus_change_no_bit(
    trained: Path, shapes: Path, tmp_path: Path
) -> None:
    precision = "segment.precision=fp32"
    on_gpu = segment(trained, shapes, tmp_path / "gpu", precision, "segment.num_gpus_per_predictor=1")
    shared = segment(trained, shapes, tmp_path / "shared", precision, "segment.num_gpus_per_predictor=0.5")
    on_cpu = segment(trained, shapes, tmp_path / "cpu", precision)
    assert shared == on_gpu
    images = [np.asarray(Image.open(row["uri"]).convert("RGB")) for row in on_cpu]
    for row, expected, logits_chw in zip(on_gpu, on_cpu, compute_logits(trained, images), strict=True):
        size = (IMAGE_SIDE, IMAGE_SIDE)
        mask, cpu_mask = (np.frombuffer(one["mask"], np.uint8).reshape(size) for one in (row, expected))
        assert (mask == cpu_mask).mean() > 0.97, row["uri"]
        assert_same_where_clear(mask, logits_chw, "fp32")
        assert_same_where_clear(cpu_mask, logits_chw, "fp32")
