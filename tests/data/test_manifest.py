"""Pairing images with masks: folders, manifests and the Oxford-IIIT Pet layout."""

import posixpath
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import csv
from pyarrow import parquet as pq

from segray.config import DataConfig
from segray.data.manifest import load_splits
from segray.data.sample_list import Sample, Splits
from segray.errors import DataError, MissingFileError
from segray.storage import normalize_uri
from tests.conftest import NUM_TEST, NUM_TRAIN

FOLDERS = tuple[Path, Path]


def load(**data: Any) -> Splits:
    return load_splits(DataConfig.model_validate({"class_names": ["a", "b"], **data}))


def test_folders_pair_by_path_without_extension(labelled_folders: FOLDERS) -> None:
    images, masks = labelled_folders
    (images / "0.png").rename(images / "0.webp")
    both = {"images": str(images), "masks": str(masks)}
    splits = load(train=both, val=both)
    assert splits.train == splits.val
    assert splits.train[0] == Sample(f"{images}/0.webp", f"{masks}/0.png")
    assert [sample.image_uri for sample in splits.train] == sorted(sample.image_uri for sample in splits.train)
    for image, mask in splits.train:
        assert Path(image).relative_to(images).with_suffix("") == Path(mask).relative_to(masks).with_suffix("")
    assert len(splits.train) == 5


@pytest.mark.parametrize("file_format", ["parquet", "csv"])
def test_a_manifest_defines_the_splits(tmp_path: Path, file_format: str) -> None:
    names = [f"{tmp_path}/{name}" for name in ("b", "a", "c")]
    columns = {"image_uri": names, "mask_uri": [f"{n}.mask" for n in names], "split": ["train", "train", "val"]}
    path = tmp_path / f"manifest.{file_format}"
    (pq.write_table if file_format == "parquet" else csv.write_csv)(pa.table(columns), path)
    splits = load(train={"manifest": str(path)}, val={"manifest": str(path)})
    assert splits.train == [Sample(n, f"{n}.mask") for n in sorted(names[:2])]
    assert splits.val == [Sample(names[2], f"{names[2]}.mask")]


def test_a_validation_fraction_depends_only_on_its_seed(labelled_folders: FOLDERS) -> None:
    both = {"images": str(labelled_folders[0]), "masks": str(labelled_folders[1])}
    drawn = [load(train=both, val={"fraction": 0.4, "seed": seed}) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert any(other.val != drawn[0].val for other in drawn[2:])
    for splits in drawn:
        assert len(splits.val) == 2
        assert set(splits.train).isdisjoint(splits.val)
        assert len(splits.train) + len(splits.val) == 5


def test_the_oxford_layout_validates_on_its_test_split_or_on_a_fraction(shapes_root: Path) -> None:
    layout = {"oxford_iiit_pet": {"root": str(shapes_root)}}
    splits = load_splits(DataConfig.model_validate({"layout": layout}))
    assert (len(splits.train), len(splits.val)) == (NUM_TRAIN, NUM_TEST)
    assert all(Path(uri).exists() for sample in (*splits.train, *splits.val) for uri in sample)
    splits = load_splits(DataConfig.model_validate({"layout": layout, "val": {"fraction": 0.5}}))
    assert (len(splits.train), len(splits.val)) == (NUM_TRAIN // 2, NUM_TRAIN // 2)


def test_errors_name_the_folder_or_file_that_cannot_be_paired(tmp_path: Path, labelled_folders: FOLDERS) -> None:
    images, masks = map(str, labelled_folders)
    val = {"fraction": 0.5}
    with pytest.raises(MissingFileError, match="nowhere"):
        load(train={"images": f"{tmp_path}/nowhere", "masks": masks}, val=val)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no image has a mask: 5 images .* 0 masks"):
        load(train={"images": images, "masks": f"{tmp_path}/empty"}, val=val)
    Image.new("L", (5, 4)).save(tmp_path / "empty" / "0.jpg")
    with pytest.raises(
        DataError, match=r"0 masks .*; found 1 JPEG files, whose compression changes class values: create"
    ):
        load(train={"images": images, "masks": f"{tmp_path}/empty"}, val=val)
    Path(masks, "2.png").unlink()
    with pytest.raises(
        DataError, match=r"1 files have no matching mask or image .*images/2\.png: no mask of this name"
    ):
        load(train={"images": images, "masks": masks}, val=val)
    Path(images, "2.png").rename(f"{images}/3.jpg")
    Path(images, "4.png").rename(f"{images}/3.png")
    with pytest.raises(DataError, match=r"3\.jpg and .*3\.png have the same name"):
        load(train={"images": images, "masks": masks}, val=val)


def test_errors_say_what_is_wrong_with_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    path.write_text("image_uri,split\na,train\n")
    with pytest.raises(DataError, match="missing: mask_uri"):
        load(train={"manifest": str(path)}, val={"manifest": str(path)})
    path.write_text("image_uri,mask_uri,split\na,m,training\n")
    with pytest.raises(DataError, match="no rows with split 'train'; the column split holds: training"):
        load(train={"manifest": str(path)}, val={"manifest": str(path)})
    path.write_text("image_uri,mask_uri,split\na,m,train\na,n,train\n")
    with pytest.raises(DataError, match="lists an image twice"):
        load(train={"manifest": str(path)}, val={"manifest": str(path)})
    path.write_text("image_uri,mask_uri,split\na,,train\n")
    with pytest.raises(DataError, match="a row has no image_uri or mask_uri"):
        load(train={"manifest": str(path)}, val={"manifest": str(path)})
    path.write_text("image_uri,mask_uri,split,split\na,m,train,train\n")
    with pytest.raises(DataError, match=r"manifest\.csv: cannot be read as a table"):
        load(train={"manifest": str(path)}, val={"manifest": str(path)})
    broken = tmp_path / "manifest.parquet"
    pq.write_table(pa.table({"image_uri": ["a"]}), broken)
    damaged_footer = bytearray(broken.read_bytes())
    damaged_footer[-60:-8] = bytes(52)
    for content in (b"no", damaged_footer):
        broken.write_bytes(content)
        with pytest.raises(DataError, match="expected Parquet or CSV"):
            load(train={"manifest": str(broken)}, val={"manifest": str(broken)})


def test_a_list_of_the_oxford_layout_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "trainval.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"trainval\.txt: expected UTF-8 text with one image name per line"):
        load_splits(DataConfig.model_validate({"layout": {"oxford_iiit_pet": {"root": str(tmp_path)}}}))


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        *((f"{stem}.JPG", f"{stem}.png") for stem in ("a", "a.b", ".a", "..a.b", "a.b/c", "a/b.c/é d", "a/.b/.c")),
        ("a/.png", "a/.png"),  # Dots at the start of a name do not begin an extension.
        ("...png", "...png"),
    ],
)
def test_an_image_and_a_mask_pair_if_splitext_leaves_the_same_path(image: str, mask: str, tmp_path: Path) -> None:
    paths = [tmp_path / "images" / image, tmp_path / "masks" / mask]
    assert posixpath.splitext(image)[0] == posixpath.splitext(mask)[0]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.touch()
    both = {"images": f"{tmp_path}/images", "masks": f"{tmp_path}/masks"}
    assert list(load(train=both, val=both).train) == [Sample(*map(str, paths))]


def test_samples_of_a_manifest_are_sorted_and_their_uris_normalized(tmp_path: Path) -> None:
    names = [f"s3://bucket/{number * 7919 % 10_000:04d}.jpg" for number in range(10_000)] + [
        "s3://bucket/é/",
        "file:///a",
    ]
    splits = ["train", "val", "train", "other"] * 2500 + ["train", "train"]
    columns = {"image_uri": names, "mask_uri": [f"{name}#mask" for name in names], "split": splits}
    path = tmp_path / "manifest.parquet"
    pq.write_table(pa.table(columns), path)
    loaded = load(train={"manifest": str(path)}, val={"manifest": str(path)})
    for split, samples in loaded._asdict().items():
        chosen = [name for name, own in zip(names, splits, strict=True) if own == split]
        expected = {normalize_uri(name): normalize_uri(f"{name}#mask") for name in chosen}
        assert list(samples) == sorted(map(Sample._make, expected.items()))
