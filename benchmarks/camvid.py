"""Prepare inputs for the segmentation benchmarks: copies of CamVid's images, and a U-Net trained on CamVid."""

import io
import subprocess
import sys
from pathlib import Path

from PIL import Image

_ROOT = Path(__file__).parents[1]
_CAMVID = _ROOT / "data/camvid"
_RUNS = _ROOT / "runs/benchmarks"
IMAGE_SIZE = (352, 480)
CLASS_NAMES = ["sky", "building", "pole", "road", "sidewalk", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]


def make_images(num_images: int, extension: str = "png") -> Path:
    """Return a folder of copies of CamVid's images (360x480); an existing one is reused.

    Args:
        num_images: Number of files; the images are repeated as often as necessary.
        extension: ``png`` for the data set's own files, or ``jpg``, encoded at quality 90 unless the data set is JPEG.
    """
    folder = _RUNS / f"images-{num_images}-{extension}"
    originals = sorted((_CAMVID / "images").rglob(f"*.{extension}")) or sorted((_CAMVID / "images").rglob("*.png"))
    if not originals:
        sys.exit(f"no images under {_CAMVID / 'images'}; put or link CamVid (360x480, SegNet tutorial's copy) there")
    if folder.exists() and sum(1 for _ in folder.iterdir()) == num_images:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    contents = [path.read_bytes() if path.suffix == f".{extension}" else _encode_jpeg(path) for path in originals]
    for number in range(num_images):
        (folder / f"{number:06d}.{extension}").write_bytes(contents[number % len(contents)])
    return folder


def _encode_jpeg(path: Path) -> bytes:
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_bundle() -> Path:
    """Return a bundle of a resnet18 U-Net for 352x480, trained on CamVid for a few minutes unless it exists already."""
    output = _RUNS / "camvid-352x480"
    bundle = output / "bundle"
    if not (bundle / "bundle.json").exists():
        settings = {
            "output": output,
            "image_size": list(IMAGE_SIZE),
            "augmentation.scale": [0.5, 1.0],
            "train.num_epochs": 10,
            "train.eval_every_epochs": 10,
        }
        overrides = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        command = [str(Path(sys.executable).with_name("segray")), "train", "jobs/camvid.yaml", *overrides]
        subprocess.run(command, check=True, cwd=_ROOT)
    return bundle
