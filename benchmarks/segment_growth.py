"""Measure whether the time per image grows with the size of a run, from 1,000 to 100,000 images.

    python benchmarks/segment_growth.py [NUM_IMAGES …]

Uses small JPEG files and a tiny network, so that almost all of the time is spent outside the model. Whole processes are
timed. Their start-up does not depend on the number of images, so the difference between two sizes is the cost of the
additional images, including listing and summary.
"""

import io
import itertools
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
from measuring import report
from PIL import Image
from segment_bound import segment

_FOLDER = Path(__file__).parents[1] / "runs/benchmarks/growth"
_SIDE_PX = 64
_ROUNDS = 3


def make_tiny_bundle(folder: Path) -> Path:
    """Write a bundle of the smallest network that segray has."""
    from segray.config import ModelConfig
    from segray.data.classes import ClassMap
    from segray.data.preprocessing import Preprocessing
    from segray.models.build import build_model
    from segray.models.bundle import BundleDescription, save_bundle

    model = ModelConfig(arch="classic_unet", encoder_weights=None, widths=(1, 1))
    description = BundleDescription(model, ClassMap(("a", "b"), (0, 1), ()), (32, 32), Preprocessing())
    save_bundle(str(folder), build_model(model, 2).state_dict(), description)
    return folder


def make_small_images(folder: Path, num_images: int) -> Path:
    """Write JPEG files of 64x64 to a new folder and return it."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    contents = []
    for _ in range(100):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (_SIDE_PX, _SIDE_PX, 3), np.uint8)).save(buffer, "JPEG")
        contents.append(buffer.getvalue())
    for number in range(num_images):
        (folder / f"{number:07d}.jpg").write_bytes(contents[number % 100])
    return folder


def main() -> None:
    """Segment folders of increasing size."""
    sizes = [int(number) for number in sys.argv[1:]] or [1_000, 10_000, 50_000, 100_000]
    shutil.rmtree(_FOLDER, ignore_errors=True)
    bundle = make_tiny_bundle(_FOLDER / "bundle")
    seconds: dict[int, list[float]] = {}
    for size in sizes:
        images = make_small_images(_FOLDER / f"images-{size}", size)
        for _ in range(_ROUNDS if size < 50_000 else 1):
            run = segment(bundle, images, _FOLDER / "out", "segment.fragment_size=64")
            seconds.setdefault(size, []).append(run.wall_s)
            print(run.output, seconds, flush=True)
        shutil.rmtree(images)
    medians = {size: statistics.median(values) for size, values in seconds.items()}
    rows, first_ms = [[f"{sizes[0]:,}", f"{medians[sizes[0]]:.1f}", "", ""]], 0.0
    for fewer, more in itertools.pairwise(sizes):
        cost_ms = 1000 * (medians[more] - medians[fewer]) / (more - fewer)
        first_ms = first_ms or cost_ms
        rows.append([f"{more:,}", f"{medians[more]:.1f}", f"{cost_ms:.3f}", f"{cost_ms / first_ms:.3f}"])
    columns = ["images", "whole process s", "ms per additional image", "relative to the first"]
    report("segment_growth", columns, rows, {"seconds": {str(size): values for size, values in seconds.items()}})
    shutil.rmtree(_FOLDER)


if __name__ == "__main__":
    main()
