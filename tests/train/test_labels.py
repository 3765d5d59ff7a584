"""The label check: counts by hand, and every fault of an image and of its mask, each even if the other is bad."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segray.classes import ClassMap
from segray.errors import DataError, FaultKind
from segray.manifest import Sample
from segray.train.labels import check_samples, require_learnable

CLASSES = ClassMap(("a", "b", "c"), (0, 1, 2), (255,))


@pytest.fixture
def samples(labelled_folders: tuple[Path, Path]) -> list[Sample]:
    images, masks = labelled_folders
    names = sorted(path.relative_to(images) for path in images.rglob("*.png"))
    return [Sample(str(images / name), str(masks / name)) for name in names]


def test_counts_are_those_of_the_files(samples: list[Sample]) -> None:
    Image.new("L", Image.open(samples[0].image_uri).size, 255).save(samples[0].mask_uri)
    Image.new("L", Image.open(samples[1].image_uri).size, 2).save(samples[1].mask_uri)
    raw = [np.asarray(Image.open(sample.mask_uri)) for sample in samples]
    report = check_samples(samples[:2], CLASSES) + check_samples(samples[2:], CLASSES)
    assert report.num_samples == len(samples)
    assert report.faults == []
    assert report.pixel_count.tolist() == [sum(int((mask == value).sum()) for mask in raw) for value in (0, 1, 2)]
    assert report.image_count.tolist() == [sum(bool((mask == value).any()) for mask in raw) for value in (0, 1, 2)]
    assert report.ignored_px == sum(int((mask == 255).sum()) for mask in raw)


def test_every_fault_is_listed_in_order(samples: list[Sample]) -> None:
    Path(samples[0].image_uri).write_bytes(b"")
    Path(samples[0].mask_uri).unlink()
    Image.new("L", (3, 3)).save(samples[2].mask_uri)
    Image.new("L", Image.open(samples[4].image_uri).size, 9).save(samples[4].mask_uri)
    report = check_samples(samples, CLASSES)
    assert [(fault.uri, fault.kind) for fault in report.faults] == [
        (samples[0].image_uri, FaultKind.UNREADABLE),
        (samples[0].mask_uri, FaultKind.MASK_MISSING),
        (samples[2].mask_uri, FaultKind.MASK_MISMATCH),
        (samples[4].mask_uri, FaultKind.MASK_MISMATCH),
    ]
    with pytest.raises(DataError, match=r"4 bad labels in val \(segray check lists all\): .*; and 1 more"):
        require_learnable(report, "val")


def test_masks_that_are_all_ignored_are_refused(samples: list[Sample]) -> None:
    for sample in samples:
        Image.new("L", Image.open(sample.image_uri).size, 255).save(sample.mask_uri)
    with pytest.raises(DataError, match="train: every pixel of its 5 masks is ignored"):
        require_learnable(check_samples(samples, CLASSES), "train")
