"""Pairing images with masks: folders, manifests and the Oxford-IIIT Pet layout."""

import posixpath
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import csv
from pyarrow import parquet as pq

from segray.config import DataConfig
from segray.data.manifest import index_masks, load_folds, load_splits
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


def test_masks_are_found_by_their_path_without_extension(tmp_path: Path) -> None:
    for name in ("a.b.png", "c/d.tif", ".e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    masks = index_masks(str(tmp_path))
    assert {key: file.uri for key, file in masks.items()} == {
        "a.b": f"{tmp_path}/a.b.png",
        "c/d": f"{tmp_path}/c/d.tif",
        ".e": f"{tmp_path}/.e.png",
    }
    (tmp_path / "c" / "d.png").touch()
    with pytest.raises(DataError, match=r"c/d\.png and .*c/d\.tif have the same name"):
        index_masks(str(tmp_path))


@pytest.fixture
def sequences(tmp_path: Path) -> dict[str, str]:
    """Folders of 6 sequences with 1 to 6 frames, in subfolders."""
    both = {"images": str(tmp_path / "images"), "masks": str(tmp_path / "masks")}
    for number in range(1, 7):
        for frame in range(number):
            for folder in both.values():
                path = Path(folder, f"day{number % 2}", f"seq{number}_{frame:04}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (4, 4)).save(path)
    return both


def test_whole_groups_are_drawn_for_validation(sequences: dict[str, str]) -> None:
    for expression, in_path in {
        r"^(.*)_\d+$": r"seq\d",
        r"seq\d+": r"seq\d",  # Without a group in the expression, the whole match.
        r"^day\d": r"day\d",
    }.items():
        drawn = set()
        for seed in range(8):
            splits = load(train=sequences, val={"fraction": 0.3, "seed": seed, "group_by": expression})
            train, val = ({*re.findall(in_path, " ".join(uri for uri, _ in split))} for split in splits)
            assert train
            assert val
            assert train.isdisjoint(val)
            assert len(splits.train) + len(splits.val) == 21
            drawn.add(tuple(sorted(val)))
        assert len(drawn) > 1 or "day" in expression


def test_given_splits_that_share_a_group_are_refused(sequences: dict[str, str], tmp_path: Path) -> None:
    other = {name: f"{folder}/day0" for name, folder in sequences.items()}  # Names start below the deepest folder.
    folders = {name: f"{folder}/day1" for name, folder in sequences.items()}
    splits = load(train=folders, val={**other, "group_by": r"^(seq\d+)_"})
    assert (len(splits.train), len(splits.val)) == (9, 12)
    shared = r"group_by: group 'seq' has 9 images in train and 12 in val \(1 such groups\); move them"
    with pytest.raises(DataError, match=shared):
        load(train=folders, val={**other, "group_by": "^seq"})


def test_a_manifest_and_the_oxford_layout_are_split_by_group_too(tmp_path: Path, shapes_root: Path) -> None:
    path = tmp_path / "manifest.csv"
    rows = [f"s3://b/{video}/{frame}.jpg,s3://b/{video}/{frame}.png,train" for video in "abc" for frame in range(3)]
    path.write_text("\n".join(["image_uri,mask_uri,split", *rows]))
    splits = load(train={"manifest": str(path)}, val={"fraction": 0.3, "group_by": "^s3://b/(.)/"})
    assert len({sample.image_uri.split("/")[3] for sample in splits.val}) == 1
    assert len(splits.val) == 3
    layout = {"oxford_iiit_pet": {"root": str(shapes_root)}}
    data = {"layout": layout, "val": {"fraction": 0.5, "group_by": "^[^/]+$"}}  # The file's name without extension.
    splits = load_splits(DataConfig.model_validate(data))
    assert (len(splits.train), len(splits.val)) == (NUM_TRAIN // 2, NUM_TRAIN // 2)


def test_a_name_that_the_expression_does_not_match_is_named(sequences: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"group_by: '\^day0/' does not match .* 'day1/seq1_0000' \(9 of 21 images\)"):
        load(train=sequences, val={"fraction": 0.3, "group_by": "^day0/"})


def test_folds_divide_the_images_of_train_and_val_by_group(sequences: dict[str, str]) -> None:
    halves = [{name: f"{folder}/day{day}" for name, folder in sequences.items()} for day in (0, 1)]
    values = {"train": halves[0], "val": {**halves[1], "group_by": r"^(seq\d+)_"}, "class_names": ["a", "b"]}
    data = DataConfig.model_validate(values)
    for divided in (load_folds(data, 3), load_folds(data, "groups")):
        folds = [list(divided.select(number)) for number in range(len(divided.sizes))]
        assert len(folds) in (3, 6)
        assert tuple(map(len, folds)) == divided.sizes
        uris = [sample.image_uri for fold in folds for sample in fold]
        assert len(uris) == len(set(uris)) == 21
        groups = [{Path(sample.image_uri).stem[:4] for sample in fold} for fold in folds]
        assert len(set().union(*groups)) == sum(map(len, groups)) == 6
        for number, fold in enumerate(folds):
            splits = divided.hold_out(number)
            assert splits.val == fold == sorted(fold)
            assert sorted([*splits.train, *splits.val]) == list(divided.join().train)
            assert splits.train == sorted(splits.train)
        assert list(divided.samples.take(divided.order)) == [sample for fold in folds for sample in fold]
    assert load_folds(data, "groups").sizes == (1, 2, 3, 4, 5, 6)
    with pytest.raises(DataError, match="7 folds need as many groups of images, found 6"):
        load_folds(data, 7)


def test_folds_without_groups_divide_single_images_and_no_image_is_in_two(sequences: dict[str, str]) -> None:
    data = {"train": sequences, "val": sequences, "class_names": ["a", "b"]}  # Every image is in both splits.
    divided = load_folds(DataConfig.model_validate(data), 4)
    assert sorted(divided.sizes) == [5, 5, 5, 6]
    assert list(divided.samples) == sorted(set(divided.samples))
    assert len(divided.samples) == 21
    hashes = {load_folds(DataConfig.model_validate(data), num_folds).compute_sha256() for num_folds in (4, 4, 3)}
    assert len(hashes) == 2
    with pytest.raises(DataError, match=r"22 folds need as many images, found 21; set train.folds to at most 21$"):
        load_folds(DataConfig.model_validate(data), 22)


def test_of_an_image_in_train_and_val_the_mask_of_train_is_used(sequences: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    image = f"{sequences['images']}/day0/seq2_0000.png"
    path.write_text(f"image_uri,mask_uri,split\n{image},other,val\ns3://b/last.png,last,val\n")
    data = {"train": sequences, "val": {"manifest": str(path)}, "class_names": ["a", "b"]}
    samples = list(load_folds(DataConfig.model_validate(data), 2).samples)
    assert len(samples) == 22
    assert samples == sorted(samples)
    assert dict(samples)[image].startswith(sequences["masks"])


def test_one_group_makes_no_folds(sequences: dict[str, str]) -> None:
    data = {"train": sequences, "val": {"fraction": 0.2, "group_by": "^day"}, "class_names": ["a", "b"]}
    with pytest.raises(DataError, match="expected 2 to 100 groups, found 1"):
        load_folds(DataConfig.model_validate(data), "groups")
