"""Run training and segmentation on generated images of shapes, in about two minutes: ``segray demo``."""

import shutil
from pathlib import Path

from rich.console import Console

from segray.config import TrainConfig
from segray.data.synthetic import save_shapes
from segray.errors import ConfigError
from segray.runtime.connect import connect_ray
from segray.segmentation.driver import print_outcome, run_segmentation
from segray.segmentation.job import SegmentJob
from segray.storage import join_uri, read_bytes, write_bytes
from segray.training.driver import run_training

NUM_TRAIN, NUM_TEST = 96, 24
_SETTINGS = {
    "image_size": [128, 128],
    "model": {"arch": "unet", "encoder_name": "resnet18"},
    "train": {"num_epochs": 6, "global_batch_size": 8, "learning_rate": 2e-3, "num_train_workers": 2},
    "segment": {"fragment_size": 8},
}


def run_demo(folder: Path, console: Console) -> None:
    """Generate shapes, train on them, segment a folder that contains two broken files, and print where the results are.

    Args:
        folder: Folder for data and results; an earlier demo in it is replaced.
        console: Receives progress and results.

    Raises:
        ConfigError: The folder is not empty and was not written by a demo.
    """
    folder = _clear(folder)
    console.rule("1 of 3: labelled images")
    shapes = _save(folder / "shapes", console)
    config = TrainConfig.model_validate(
        {**_SETTINGS, "data": {"layout": {"oxford_iiit_pet": {"root": shapes}}}, "output": str(folder / "train")}
    )
    with connect_ray():  # Otherwise training and segmentation would each start a private Ray.
        console.rule("2 of 3: segray train")
        bundle = run_training(config, console)
        console.rule("3 of 3: segray segment")
        images, masks = _copy_test_images(shapes, folder / "bucket")
        job = SegmentJob(bundle, (images,), str(folder / "segmented"), (masks,), config.segment)
        outcome = run_segmentation(job, console)
    print_outcome(outcome, console)
    for name in ("bundle", "bundle/model_card.md", "bundle/worst.png", "bundle/curves.png"):
        console.print(f"{name:<24}{folder / 'train' / name}", highlight=False)


def run_demo_data(folder: Path, console: Console) -> None:
    """Generate the labelled images only.

    Raises:
        ConfigError: The folder is not empty and was not written by a demo.
    """
    _save(_clear(folder), console)


def _save(folder: Path, console: Console) -> str:
    save_shapes(str(folder), NUM_TRAIN, NUM_TEST)
    console.print(f"generated {NUM_TRAIN} training and {NUM_TEST} test images: {folder}", highlight=False)
    return str(folder)


def _clear(folder: Path) -> Path:
    """Create an empty folder, removing an earlier demo but never other files; return its absolute path."""
    folder = folder.absolute()
    marker = folder / ".segray-demo"
    if folder.exists() and any(folder.iterdir()):
        if not marker.exists():
            raise ConfigError(f"--output {folder}: not empty and not written by a demo; choose another --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    return folder


def _copy_test_images(shapes: str, bucket: Path) -> tuple[str, str]:
    """Copy test images and masks to their own folders, add an empty and a truncated image, and return the folders."""
    images, masks = str(bucket / "images"), str(bucket / "masks")
    names = [line.split()[0] for line in read_bytes(join_uri(shapes, "annotations/test.txt")).decode().splitlines()]
    for name in names:
        write_bytes(join_uri(images, f"{name}.jpg"), read_bytes(join_uri(shapes, "images", f"{name}.jpg")))
        mask = read_bytes(join_uri(shapes, "annotations/trimaps", f"{name}.png"))
        write_bytes(join_uri(masks, f"{name}.png"), mask)
    whole = read_bytes(join_uri(images, f"{names[0]}.jpg"))
    write_bytes(join_uri(images, "broken_empty.jpg"), b"")
    write_bytes(join_uri(images, "broken_truncated.jpg"), whole[: len(whole) // 2])
    return images, masks
