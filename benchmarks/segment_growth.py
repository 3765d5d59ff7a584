"""Whether an image costs the same in a run of a thousand as in one of a hundred thousand.

    python benchmarks/segment_growth.py [NUM_IMAGES …]

Small JPEG files and a network of a few weights, so that what is not the model is all there is. Time per image is that
between the first written fragment and the end of the process: the summary and the report are part of it.
"""

import io
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
from measuring import report
from PIL import Image
from segment_bound import get_written_times, segment

_FOLDER = Path(__file__).parents[1] / "runs/benchmarks/growth"
_SIDE_PX = 64
_ROUNDS = 3


def make_tiny_bundle(folder: Path) -> Path:
    """Write a bundle of the smallest network that segray has."""
    from segray.bundle import save_bundle
    from segray.classes import ClassMap
    from segray.config import ModelConfig
    from segray.models.build import build_model
    from segray.transforms import Preprocessing

    model = ModelConfig(arch="classic_unet", encoder_weights=None, widths=(1, 1))
    save_bundle(
        str(folder),
        weights=build_model(model, 2).state_dict(),
        model=model,
        classes=ClassMap(("a", "b"), (0, 1), ()),
        image_size=(32, 32),
        preprocessing=Preprocessing(),
        metrics={},
        config={},
        files={},
    )
    return folder


def make_small_images(folder: Path, num_images: int) -> Path:
    """Write that many JPEG files of 64x64."""
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
    """Segment buckets of growing size."""
    sizes = [int(number) for number in sys.argv[1:]] or [1_000, 10_000, 100_000]
    shutil.rmtree(_FOLDER, ignore_errors=True)
    bundle = make_tiny_bundle(_FOLDER / "bundle")
    figures: dict[str, list[float]] = {}
    for size in sizes:
        images, output = make_small_images(_FOLDER / f"images-{size}", size), _FOLDER / "out"
        for _ in range(_ROUNDS if size < 100_000 else 1):
            run = segment(bundle, images, output)
            times = get_written_times(output)
            after_first = size * (1 - 1 / len(times))
            figures.setdefault(str(size), []).append((times[-1] - times[0]) / after_first)
            print(run.output, figures, flush=True)
        shutil.rmtree(images)
    first = statistics.median(figures[str(sizes[0])])
    medians = {size: statistics.median(values) for size, values in figures.items()}
    rows = [[f"{int(size):,}", f"{1000 * value:.3f}", f"{value / first:.3f}"] for size, value in medians.items()]
    report("segment_growth", ["images", "ms per image", "times the first"], rows, {"seconds_per_image": figures})
    shutil.rmtree(_FOLDER)


if __name__ == "__main__":
    main()
