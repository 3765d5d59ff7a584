"""The label check: counts compared with plain numpy, and every fault of an image and of its mask."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from segray.data.classes import ClassMap
from segray.data.sample_list import Sample
from segray.errors import DataError, FaultKind
from segray.models.losses import compute_median_frequency_weights
from segray.training.labels.duplicates import CheckedImages, find_duplicates
from segray.training.labels.inspect import check_samples, suggest_declarations
from segray.training.labels.near_duplicates import NO_THUMBPRINT, THUMBPRINT
from segray.training.labels.split_report import SplitReport, WarningKind, require_learnable

CLASSES = ClassMap(("a", "b", "c"), (0, 1, 2), (255,))
TWELVE = ClassMap(tuple("abcdefghijkl"), tuple(range(12)))
# CamVid is not part of the repository; jobs/camvid.yaml uses the same path.
CAMVID = Path(__file__).parents[3] / "data" / "camvid"


@pytest.fixture
def samples(labelled_folders: tuple[Path, Path]) -> list[Sample]:
    images, masks = labelled_folders
    names = sorted(path.relative_to(images) for path in images.rglob("*.png"))
    return [Sample(str(images / name), str(masks / name)) for name in names]


def unpack_presence(report: SplitReport) -> npt.NDArray[np.bool_]:
    """Return whether each image contains each of up to 8 classes, (N, C)."""
    bits = np.unpackbits(np.frombuffer(report.presence, np.uint8)[:, None], axis=1, count=len(report.image_count))
    return bits.astype(bool)


def test_counts_equal_those_of_the_files(samples: list[Sample]) -> None:
    Image.new("L", Image.open(samples[0].image_uri).size, 255).save(samples[0].mask_uri)
    Image.new("L", Image.open(samples[1].image_uri).size, 2).save(samples[1].mask_uri)
    raw = [np.asarray(Image.open(sample.mask_uri)) for sample in samples]
    report = check_samples(samples[:2], CLASSES) + check_samples(samples[2:], CLASSES)
    assert report.num_samples == len(samples)
    assert report.faults == []
    assert report.pixel_count.tolist() == [sum(int((mask == value).sum()) for mask in raw) for value in (0, 1, 2)]
    assert report.image_count.tolist() == [sum(bool((mask == value).any()) for mask in raw) for value in (0, 1, 2)]
    present = np.array([[bool((mask == value).any()) for value in (0, 1, 2)] for mask in raw])
    np.testing.assert_array_equal(unpack_presence(report), present)
    assert report.ignored_px == sum(int((mask == 255).sum()) for mask in raw)
    labelled_px = [int((mask != 255).sum()) for mask in raw]
    assert report.image_px.tolist() == [
        sum(number for number, mask in zip(labelled_px, raw, strict=True) if (mask == value).any())
        for value in (0, 1, 2)
    ]


def test_class_weights_follow_from_the_counts_of_the_files(tmp_path: Path) -> None:
    halves = np.repeat([[0, 1]], 10, 0).repeat(5, 1)
    only_a = np.zeros((10, 10), int)
    report = check_samples([save(tmp_path, "0", halves), save(tmp_path, "1", only_a)], CLASSES)
    # Class a has 150 of 200 pixels, b has 50 of the 100 pixels of the only image that contains it, c has none.
    np.testing.assert_allclose(
        compute_median_frequency_weights(report.pixel_count, report.image_px), [0.625 / 0.75, 0.625 / 0.5, 1]
    )


def test_every_fault_is_listed_in_the_order_of_the_samples(samples: list[Sample]) -> None:
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
    is_known = unpack_presence(report).any(1)
    assert is_known.tolist() == [False, True, False, True, False]  # Every image has its row.
    with pytest.raises(DataError, match=r"4 bad labels in val \(segray check lists all\): .*; and 1 more"):
        require_learnable(report, "val")


def test_a_split_in_which_every_pixel_is_ignored_raises(samples: list[Sample]) -> None:
    for sample in samples:
        Image.new("L", Image.open(sample.image_uri).size, 255).save(sample.mask_uri)
    with pytest.raises(DataError, match="train: every pixel of its 5 masks is ignored"):
        require_learnable(check_samples(samples, CLASSES), "train")


def save(folder: Path, name: str, mask: npt.ArrayLike, seed: int = 0) -> Sample:
    """Write a noise image and its mask, with values up to 255."""
    raw = np.asarray(mask, np.uint8)
    image = np.random.default_rng(seed).integers(0, 256, (*raw.shape[:2], 3), np.uint8)
    sample = Sample(str(folder / f"{name}.png"), str(folder / f"{name}_mask.png"))
    Image.fromarray(image).save(sample.image_uri)
    Image.fromarray(raw).save(sample.mask_uri)
    return sample


def draw_blocks(values: npt.ArrayLike, side: int = 100) -> npt.NDArray[np.uint8]:
    """Return a mask of blocks of the given values, with sharp edges."""
    rng = np.random.default_rng(0)
    return rng.choice(np.asarray(values, np.uint8), (side // 10, side // 10)).repeat(10, 0).repeat(10, 1)


def check_all(samples: list[Sample], classes: ClassMap, val: list[Sample] | None = None) -> dict[str, SplitReport]:
    reports = {"train": check_samples(samples, classes), "val": check_samples(val or [], classes)}
    reports = suggest_declarations(reports, classes)
    train = CheckedImages(samples, reports["train"].digests, reports["train"].thumbprints, lambda _: "train")
    found = find_duplicates(val or [], reports["val"], train)
    return {**reports, "val": replace(reports["val"], warnings=reports["val"].warnings + found)}


@pytest.mark.parametrize(
    ("classes", "masks", "remedy"),
    [
        (("a", "b"), [[0, 255], [0]], "a 0/255 mask: set data.class_values: [0, 255]"),
        (("a", "b"), [[0, 255], [0, 1]], "255 usually means void: set data.ignore_values: [255]"),
        (("a", "b", "c"), [[0, 255]], "255 usually means void: set data.ignore_values: [255]"),
        (("a", "b", "c"), [[1, 2], [3], [2]], "values start at 1: set data.class_values: [1, 2, 3]"),
        (("a", "b"), [[1, 2, 255]], "values start at 1: set data.class_values: [1, 2] and data.ignore_values: [255]"),
        (
            ("a", "b"),
            [[2], [0, 1]],
            "the masks hold one value more than there are classes: if 2 is void, set data.ignore_values: [2]; if 0 is "
            "void, set data.class_values: [1, 2] and data.ignore_values: [0]",
        ),
        (
            ("a", "b", "c"),
            [[0, 7], [9]],
            "the masks hold as many values as there are classes: set data.class_values: [0, 7, 9]",
        ),
        (("a", "b"), [[0, 7], [9]], "expected 0, 1: add 7, 9 to data.class_values or data.ignore_values"),
    ],
)
def test_undeclared_values_have_one_remedy_that_fits_all_masks(
    tmp_path: Path, classes: tuple[str, ...], masks: list[list[int]], remedy: str
) -> None:
    samples = [save(tmp_path, str(number), draw_blocks(values)) for number, values in enumerate(masks)]
    reports = check_all(samples[:1], ClassMap(classes, tuple(range(len(classes)))), samples[1:])
    faults = [fault for report in reports.values() for fault in report.faults]
    assert all(re.search(r"mask values? .* not declared \(\d+ pixels\)", fault.message) for fault in faults)
    assert {fault.remedy for fault in faults} == {remedy}
    bad = next(report for report in reports.values() if report.faults)
    with pytest.raises(DataError, match=re.escape(remedy)):
        require_learnable(bad, "train")


def save_jpeg(raw: npt.NDArray[np.uint8], path: str) -> None:
    Image.fromarray(raw).save(path, "JPEG")


def save_colours(raw: npt.NDArray[np.uint8], path: str) -> None:
    Image.fromarray(np.stack([raw, 255 - raw, raw], 2)).save(path)


def save_grey_as_rgb(raw: npt.NDArray[np.uint8], path: str) -> None:
    Image.fromarray(raw).convert("RGBA").save(path)


def save_smaller(raw: npt.NDArray[np.uint8], path: str) -> None:
    Image.fromarray(raw[:40, :60]).save(path)


@pytest.mark.parametrize(
    ("save_wrongly", "expected"),
    [
        (save_jpeg, "JPEG file, whose compression changes class values; create the mask again from its source, as PNG"),
        (save_colours, "expected one channel of class values, got RGB; replace each colour by its class value"),
        (save_grey_as_rgb, "got RGBA; its channels are equal: save only the first one, as greyscale PNG"),
        (save_smaller, "mask of 60x40 pixels for an image of 100x100; save the mask at the image's size"),
        (lambda raw, path: Path(path).write_bytes(b""), "empty file; replace the mask, or remove its image"),
        (lambda raw, path: Path(path).unlink(), "; add it, or remove its image from the data set"),
    ],
)
def test_a_wrongly_saved_mask_is_one_fault_with_a_remedy(
    tmp_path: Path, save_wrongly: Callable[[npt.NDArray[np.uint8], str], None], expected: str
) -> None:
    raw = draw_blocks([0, 1, 2])
    sample = save(tmp_path, "0", raw)
    assert check_samples([sample], CLASSES).faults == []
    save_wrongly(raw, sample.mask_uri)
    report = check_samples([sample], CLASSES)
    (fault,) = report.faults
    assert (fault.uri, expected in str(fault)) == (sample.mask_uri, True)
    assert not report.pixel_count.any()


def blur(raw: npt.NDArray[np.uint8], scale: float) -> npt.NDArray[np.uint8]:
    """Resize a mask with bilinear interpolation, which is correct only for images."""
    size = (round(raw.shape[1] * scale), round(raw.shape[0] * scale))
    return np.asarray(Image.fromarray(raw).resize(size, Image.Resampling.BILINEAR))


def compress(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the values of a mask after saving it as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(raw).save(buffer, "JPEG")
    return np.asarray(Image.open(buffer))


@pytest.mark.parametrize("spoil", [lambda raw: blur(raw, 0.5), lambda raw: blur(raw, 1.3), compress])
def test_mixed_values_are_a_fault_if_undeclared_and_a_warning_if_declared(
    tmp_path: Path, spoil: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]
) -> None:
    sparse = ClassMap(("a", "b"), (0, 200))
    clean = draw_blocks([0, 200])
    undeclared, unchanged = save(tmp_path, "0", spoil(clean)), save(tmp_path, "1", clean)
    report = check_all([undeclared, unchanged], sparse)["train"]
    (fault,) = report.faults
    assert fault.uri == undeclared.mask_uri
    assert "looks resized with interpolation or saved as JPEG; resize masks with nearest neighbour" in str(fault)
    assert report.values == {0, 200}
    assert report.warnings == []

    clean = draw_blocks([0, 4, 8, 11])
    report = check_samples([save(tmp_path, "2", spoil(clean).clip(0, 11)), save(tmp_path, "3", clean)], TWELVE)
    assert report.faults == []
    (warning,) = report.warnings
    assert (warning.kind, warning.uri) == (WarningKind.INTERPOLATED, str(tmp_path / "2_mask.png"))
    assert "nearest neighbour" in warning.remedy


@pytest.mark.parametrize("orientation", [6, 8])
def test_an_image_rotated_by_exif_with_an_unrotated_mask_is_distinguished_from_a_wrong_size(
    tmp_path: Path, orientation: int
) -> None:
    sample = save(tmp_path, "0", draw_blocks([0, 1])[:60])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.open(sample.image_uri)
    image.save(sample.image_uri, exif=exif)
    (fault,) = check_samples([sample], CLASSES).faults
    assert str(fault) == (
        f"{sample.mask_uri}: mask_mismatch: mask of 100x60 pixels for an image of 60x100, which is rotated by its EXIF "
        "orientation; rotate the mask to match the image as viewers show it, or save the image without EXIF"
    )
    image.transpose(Image.Transpose.ROTATE_90).save(sample.image_uri)
    (fault,) = check_samples([sample], CLASSES).faults
    assert "EXIF" not in str(fault)
    image.save(sample.image_uri, exif=exif)
    Image.open(sample.mask_uri).save(sample.mask_uri, exif=exif)
    assert check_samples([sample], CLASSES).faults == []


def test_a_mask_in_which_every_pixel_is_ignored_is_a_warning(tmp_path: Path) -> None:
    samples = [save(tmp_path, "0", draw_blocks([0, 255])), save(tmp_path, "1", draw_blocks([255]))]
    report = check_samples(samples, CLASSES)
    assert report.faults == []
    (warning,) = report.warnings
    assert (warning.uri, warning.kind) == (samples[1].mask_uri, WarningKind.ALL_IGNORED)
    require_learnable(report, "train")


def test_an_image_in_both_splits_is_a_warning_regardless_of_its_encoding(tmp_path: Path) -> None:
    mask = draw_blocks([0, 1])
    train = [save(tmp_path, f"train_{seed}", mask, seed) for seed in range(3)]
    val = [save(tmp_path, f"val_{seed}", mask, seed + 2) for seed in range(3)]
    again = val[0]._replace(image_uri=str(tmp_path / "again.webp"))
    Image.open(val[0].image_uri).save(again.image_uri, lossless=True)
    Path(train[0].image_uri).write_bytes(b"")  # Unreadable files are not duplicates.
    Path(val[2].image_uri).write_bytes(b"")
    wide, high = save(tmp_path, "wide", mask[:50]), save(tmp_path, "high", mask[:, :50])
    for sample in (wide, high):  # Equal bytes, different shapes.
        Image.new("RGB", Image.open(sample.image_uri).size).save(sample.image_uri)
    reports = check_all([*train, wide], CLASSES, [again, *val[1:], high])
    assert reports["train"].warnings == []
    (warning,) = reports["val"].warnings
    assert (warning.uri, warning.kind) == (again.image_uri, WarningKind.DUPLICATE)
    assert train[2].image_uri in warning.message
    assert len(reports["train"].digests) == 4 * 16


def test_an_image_that_looks_like_one_in_train_is_a_warning_with_the_distance(tmp_path: Path) -> None:
    mask = draw_blocks([0, 1])
    train = [save(tmp_path, f"train_{seed}", mask, seed) for seed in range(2)]
    val = [save(tmp_path, f"val_{seed}", mask, seed) for seed in (1, 5, 0)]
    for sample in (train[0], val[2]):  # One image is drawn twice, and saved as JPEG the second time.
        Image.fromarray(draw_blocks(range(0, 250, 25))).convert("RGB").save(sample.image_uri, "PNG")
    Image.open(val[2].image_uri).save(val[2].image_uri, "JPEG", quality=70)
    equal, near = check_all(train, CLASSES, val)["val"].warnings
    assert (equal.uri, equal.kind) == (val[0].image_uri, WarningKind.DUPLICATE)
    assert (near.uri, near.kind) == (val[2].image_uri, WarningKind.NEAR_DUPLICATE)
    assert re.search(rf"looks like {train[0].image_uri} in train \([0-7] of 128 bits of the hashes differ\)", str(near))
    assert "the validation score is too high" in near.remedy


def test_many_duplicates_are_counted_and_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.training.labels.duplicates._MAX_DUPLICATES", 2)
    monkeypatch.setattr("segray.training.labels.near_duplicates._MAX_OTHERS", 10)
    val = [Sample(f"val{number}", "m") for number in range(9)]
    train = [Sample(f"train{number}", "m") for number in range(20)]
    thumbprints = np.zeros(20, THUMBPRINT)
    thumbprints["bits"] = np.arange(1, 21)[:, None] * 1000
    digests = b"".join(bytes([number]) * 16 for number in range(1, 10))
    report = replace(SplitReport.empty(2), digests=digests, thumbprints=thumbprints[:9].tobytes())
    # The first 4 images are equal, and the others look alike.
    others = CheckedImages(train, digests[: 4 * 16] + bytes(16 * 16), thumbprints.tobytes(), lambda _: "train")
    messages = [warning.message for warning in find_duplicates(val, report, others)]
    assert messages[:2] == ["same pixels as train0 in train", "same pixels as train1 in train"]
    assert messages[2] == "looks like train4 in train (0 of 128 bits of the hashes differ)"
    assert messages[3].startswith("looks like train5 in train")
    assert messages[3].endswith("; 5 more such images are not listed")
    assert len(messages) == 4

    thumbprints["bits"] = np.arange(1, 21)[:, None] ** 3 * np.arange(3, 11)
    thumbprints["bits"][:, 0] = 1
    report = replace(report, digests=bytes(9 * 16), thumbprints=NO_THUMBPRINT * 8 + thumbprints[:1].tobytes())
    others = CheckedImages(train, bytes(20 * 16), thumbprints[1:].tobytes() + NO_THUMBPRINT, lambda _: "train")
    (warning,) = find_duplicates(val, report, others)
    assert (warning.uri, warning.kind) == ("val8", WarningKind.NOT_COMPARED)
    assert warning.message.startswith("one of 1 images that look in part like too many others")


@pytest.mark.skipif(not CAMVID.exists(), reason="needs CamVid at data/camvid")
def test_clean_camvid_masks_give_no_warning_and_corrupted_ones_give_one(tmp_path: Path) -> None:
    classes = ClassMap(tuple("abcdefghijk"), tuple(range(11)), (11,))
    masks = sorted((CAMVID / "masks").rglob("*.png"))
    samples = [Sample(str(CAMVID / "images" / path.relative_to(CAMVID / "masks")), str(path)) for path in masks]
    report = check_samples(samples[::8], classes)
    assert (report.faults, report.warnings) == ([], [])
    for path in masks[::40]:
        raw = np.asarray(Image.open(path))
        assert check_samples([save(tmp_path, "0", raw[2::4, 2::4])], classes).warnings == []
        for number, corrupted in enumerate([blur(raw, 0.5), blur(raw, 0.9), blur(raw, 1.3), compress(raw)]):
            report = check_samples([save(tmp_path, "1", corrupted.clip(0, 11))], classes)
            kinds = [warning.kind for warning in report.warnings]
            assert kinds == [WarningKind.INTERPOLATED], (path, number)
