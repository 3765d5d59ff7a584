"""Listing of input images: every kind of input, unusual file names, and no duplicates."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import csv
from pyarrow import parquet as pq

from segray.config import SegmentSettings
from segray.errors import ChangedFileError, ConfigError, DataError, MissingFileError, SegrayError, UnusableFileError
from segray.runs.listing import ListedImage
from segray.segmentation.planning import lists
from segray.segmentation.planning.inputs import merge_sources, open_sources
from segray.storage import find_file, normalize_uri

NAMES = [
    "a b.png",
    "a#b.PNG",
    "a%20b.jpg",
    "a?b.JpEg",
    "a[1].webp",
    "a*.bmp",
    ".hidden.gif",
    "_under.tif",
    "ü.tiff",
    "sub/a b.png",
    "sub/deep/x.png",
    "sub-x.png",
    "other/a b.png",
]
OTHER_FILES = ["notes.txt", "png", "a.png.bak", "sub/x.svg"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    for name in [*NAMES, *OTHER_FILES]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "folder.png").mkdir()
    return folder


def list_images(*uris: object, masks: tuple[object, ...] = (), **settings: object) -> list[ListedImage]:
    sources = open_sources([str(uri) for uri in uris], [str(uri) for uri in masks], SegmentSettings(**settings))
    return [ListedImage(**row) for batch in merge_sources(sources) for row in batch.to_pylist()]


def get_names(images: list[ListedImage], root: Path) -> list[str]:
    return [image.uri.removeprefix(f"{root}/") for image in images]


def test_a_folder_lists_all_images_below_it_sorted_with_size_and_etag(root: Path) -> None:
    images = list_images(root)
    assert get_names(images, root) == sorted(NAMES)
    for image in images:
        assert image.size_bytes == len(Path(image.uri).read_bytes())
        found = find_file(image.uri)
        assert found is not None
        assert image.etag == found.etag


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["a b.png", "sub-x.png"]),
        ("a?b.*", ["a b.png", "a#b.PNG", "a?b.JpEg"]),
        ("*/a b.png", ["other/a b.png", "sub/a b.png"]),
        ("sub/**/*.png", ["sub/a b.png", "sub/deep/x.png"]),
        ("sub*/**", ["sub/a b.png", "sub/deep/x.png"]),
        ("s*.png", ["sub-x.png"]),
        ("[_.]*", [".hidden.gif", "_under.tif"]),
        ("sub/d*p/x.png", ["sub/deep/x.png"]),
    ],
)
def test_a_glob_matches_as_in_a_shell(root: Path, pattern: str, expected: list[str]) -> None:
    assert get_names(list_images(root / pattern), root) == expected


def test_a_folder_whose_name_looks_like_a_glob_is_a_folder(root: Path) -> None:
    folder = root / "x[12]*"
    folder.mkdir()
    (folder / "y.png").touch()
    (root / "x1").mkdir()
    (root / "x1" / "n.png").touch()
    assert get_names(list_images(folder), root) == ["x[12]*/y.png"]


def test_extensions_and_recursive_are_applied(root: Path) -> None:
    assert get_names(list_images(root, extensions=["SVG", ".txt"]), root) == ["notes.txt", "sub/x.svg"]
    assert get_names(list_images(root, recursive=False), root) == sorted(name for name in NAMES if "/" not in name)
    with pytest.raises(ValueError, match="expected extensions such as png"):
        SegmentSettings(extensions=("png", "."))


def test_several_inputs_are_merged_into_one_sorted_listing_without_duplicates(root: Path) -> None:
    images = list_images(root / "sub", root, root / "sub" / "*.png", root / "a b.png")
    assert get_names(images, root) == sorted(NAMES)
    assert all(image.etag for image in images)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("read_bytes", [1, 7, 2**24])
def test_uris_of_a_text_list_are_taken_literally(
    root: Path, tmp_path: Path, newline: str, read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segray.data.table_files._READ_BYTES", read_bytes)
    chosen = [str(root / name) for name in reversed(NAMES)]
    path = tmp_path / "list.txt"
    uris = [*chosen, "", " \t", "s3://bucket/a%20b #1?.png", " /blank.png ", chosen[0]]
    path.write_bytes(newline.join(uris).encode("utf-8-sig"))
    images = list_images(path)
    assert [image.uri for image in images] == sorted(
        [*chosen, "s3://bucket/a%20b #1?.png", str(Path(" /blank.png ").absolute())]
    )
    assert {image.etag for image in images} == {None}


def test_an_etag_from_a_folder_listing_is_kept_for_images_of_a_text_list(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"{root}/a b.png\n")
    for order in ([path, root], [root, path]):
        assert all(image.etag for image in list_images(*order))


def save_csv(table: pa.Table, path: Path) -> None:
    csv.write_csv(table, path)


@pytest.mark.parametrize(("suffix", "save"), [("csv", save_csv), ("parquet", pq.write_table)])
@pytest.mark.parametrize("column", ["image_uri", "uri"])
def test_a_manifest_provides_masks_sizes_and_etags(
    tmp_path: Path, suffix: str, save: Callable[[pa.Table, Path], None], column: str
) -> None:
    path = tmp_path / f"manifest.{suffix}"
    columns = {
        column: ["/d/2.png", "/d/10.png", "/d/3.png"],
        "mask_uri": ["/m/2.png", "/m/10.png", None],
        "size_bytes": [20, 100, 30],
        "etag": ['"22"', "1010", '"33"'],  # quoted as in HTTP, or unquoted
        "split": ["val", "train", "val"],
        "comment": ["x", "y", "z"],
    }
    save(pa.table(columns), path)
    images = list_images(path, split="val")
    assert [(image.uri, image.size_bytes, image.etag) for image in images] == [
        ("/d/2.png", 20, "22"),
        ("/d/3.png", 30, "33"),
    ]
    assert [image.mask_uri for image in images] == ["/m/2.png", None]
    assert [image.uri for image in list_images(path)] == ["/d/10.png", "/d/2.png", "/d/3.png"]
    assert open_sources([str(path)], [], SegmentSettings())[0].has_truth


def test_an_empty_etag_is_none(tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    path.write_text("image_uri,etag\n/a.png,\n/b.png,1\n")
    assert [image.etag for image in list_images(path)] == [None, "1"]


def test_sizes_of_a_csv_may_be_missing_or_written_as_floats(tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    path.write_text("image_uri,size_bytes,x\n/a.png,20.0,1\n/b.png,,y\n/c.png,NaN,2\n/d.png,4000000000,3\n")
    assert [image.size_bytes for image in list_images(path)] == [20, None, None, 4_000_000_000]


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_a_parquet_manifest_may_store_strings_in_any_type(tmp_path: Path, type_: pa.DataType) -> None:
    uris = pa.array(["/b.png", "/a.png"]).cast(type_)
    pq.write_table(pa.table({"uri": uris, "split": pa.array(["x", "y"]).cast(type_)}), tmp_path / "m.parquet")
    assert [image.uri for image in list_images(tmp_path / "m.parquet", split="y")] == ["/a.png"]


def test_uris_of_lists_are_spelled_as_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uris = [
        "/a//b.png",
        "/a/./c.png",
        "/a/d.png/",
        "//two",
        "/a/../e.png",
        "/.f",
        "/g.",
        "h.png",
        "~/i.png",
        "/",
        "/j/.",
    ]
    uris += [
        "file:///k%20l.png",
        "s3://b/m/",
        "s3://b//n",
        "s3://b/./o",
        "gs://b/p.png",
        "s3://b/file://",
        "/q/file://",
    ]
    (tmp_path / "manifest.csv").write_text("uri,mask_uri\n" + "".join(f"{uri},{uri}\n" for uri in uris))
    images = list_images(tmp_path / "manifest.csv")
    assert [image.uri for image in images] == sorted(map(normalize_uri, uris))
    assert [image.mask_uri for image in images] == [image.uri for image in images]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "txt"])
def test_lists_are_sorted_on_disk(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.segmentation.planning.sorting._RUN_BYTES", 10_000)
    monkeypatch.setattr("segray.segmentation.planning.sorting._RUN_BATCH_ROWS", 10)
    monkeypatch.setattr("segray.data.table_files._READ_BYTES", 2**13)
    monkeypatch.setattr("segray.data.table_files._BATCH_ROWS", 100)
    monkeypatch.setattr("segray.data.table_files._WHOLE_FILE_BYTES", 1000)
    numbers = random.Random(0).sample(range(10_000), 1000)
    uris = [f"s3://bucket/images/{number:05}.png" for number in [*numbers, *numbers[:100]]]
    path = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"uri": uris}), path)
    else:
        path.write_text("\n".join(["uri", *uris] if suffix == "csv" else uris))
    assert [image.uri for image in list_images(path)] == sorted(set(uris))


@pytest.mark.parametrize(
    ("tags", "kept"), [("1-2", "1"), ("-1-2", "1"), ("--", None), ("-1", "1"), ("1-", "1")], ids=str
)
def test_the_first_entry_with_an_entity_tag_is_kept(tmp_path: Path, tags: str, kept: str | None) -> None:
    paths = []
    for number, tag in enumerate(tags.split("-")):
        paths.append(tmp_path / f"{number}.csv")
        paths[-1].write_text(f"uri,etag,size_bytes\n/a.png,x,0\n/b.png,{tag},{number}\n/c.png,y,0\n")
    images = list_images(*paths)
    assert [image.uri for image in images] == ["/a.png", "/b.png", "/c.png"]
    assert images[1].etag == kept
    assert images[1].size_bytes == (tags.split("-").index(kept) if kept else len(paths) - 1)


def test_a_list_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.data.table_files._WHOLE_FILE_BYTES", 10)
    path = tmp_path / "list.txt"
    path.write_text("/a.png\n" * 10)
    (source,) = open_sources([str(path)], [], SegmentSettings())
    monkeypatch.setattr("segray.data.table_files._READ_BYTES", 7)
    decode = lists._decode

    def replace(content: bytes, uri: str) -> str:
        path.write_text("/b.png\n" * 11)
        return decode(content, uri)

    monkeypatch.setattr(lists, "_decode", replace)
    with pytest.raises(ChangedFileError, match="has changed while it was read"):
        list(merge_sources([source]))


def test_masks_are_paired_by_path_below_each_folder(root: Path, tmp_path: Path) -> None:
    for name in ("one/a b.png", "one/deep/x.png", "two/a b.png"):
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "masks" / name).write_text(name)
    masks = tmp_path / "masks"
    images = list_images(root / "sub", root / "other" / "*.png", masks=(masks / "one", masks / "two"))
    assert {image.uri.removeprefix(f"{root}/"): str(image.mask_uri).removeprefix(f"{masks}/") for image in images} == {
        "sub/a b.png": "one/a b.png",
        "sub/deep/x.png": "one/deep/x.png",
        "other/a b.png": "two/a b.png",
    }
    assert all(image.mask_etag for image in images)


@pytest.mark.parametrize(
    ("uris", "masks", "error", "message"),
    [
        (["{root}/nowhere"], [], MissingFileError, "cannot list .*nowhere"),
        (["{root}/nowhere/*.png"], [], MissingFileError, "cannot list .*nowhere"),
        (["s3://buck*/x"], [], ConfigError, "patterns are not allowed in bucket names"),
        (["{root}", "{root}/sub"], ["{root}"], ConfigError, "2 --images and 1 --masks; give one"),
        (["{root}/list.txt"], ["{root}"], ConfigError, "give a manifest with a column mask_uri"),
        (["{root}/list.csv"], [], DataError, "expected a column image_uri; the columns are x"),
        (["{root}/broken.parquet"], [], DataError, "expected Parquet or CSV"),
        (["{root}/binary.txt"], [], DataError, "expected UTF-8 text with one image URI per line"),
        (["{root}/hole.csv"], [], DataError, "row 2 has no image URI"),
        (
            ["{root}/long.txt"],
            [],
            DataError,
            "expected a text file, got a line of more than 1,048,576 bytes",
        ),
        (["{root}/late.txt"], [], DataError, r"expected UTF-8 text .*, got b'\\xff'"),
        (["{root}/size.csv"], [], DataError, "column size_bytes: .*big"),
        (["{root}/size.parquet"], [], DataError, "column size_bytes"),
        (
            ["{root}/secret.txt"],
            [],
            DataError,
            r"secret\.txt: row 2: the URI contains a password, which would be stored",
        ),
        (["{root}/secret.csv"], [], DataError, r"secret\.csv: row 1: the URI contains a password"),
        (["{root}/host.txt"], [], UnusableFileError, "the name of a host"),
        (["{root}/late.csv"], [], DataError, "row 200001 has no image URI"),
        (["{root}/double.csv"], [], DataError, r"double\.csv: cannot be read as a table"),
        (["{root}/two.csv"], [], DataError, "/i.png is listed twice, with the masks /m1.png and /m2.png"),
        (["{root}/sub"], ["{root}/other/none"], MissingFileError, "cannot list"),
    ],
)
def test_unusable_input_is_refused_with_its_cause(
    root: Path, uris: list[str], masks: list[str], error: type[SegrayError], message: str
) -> None:
    (root / "list.txt").write_text("/x.png\n")
    (root / "list.csv").write_text("x\n1\n")
    (root / "broken.parquet").write_text("no")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (root / "secret.txt").write_text("abfs://container@account/b:c@d.png\ns3://key:secret@bucket/a.png\n")
    (root / "secret.csv").write_text("uri,mask_uri\n/a.png,s3://key:secret@bucket/a.png\n")
    (root / "host.txt").write_text("file://a.png\n")
    (root / "late.txt").write_bytes(b"/a.png\n" * 300_000 + b"/b\xff.png")
    (root / "long.txt").write_bytes(b"/a.png\n" + b"x" * 2**21)
    (root / "late.csv").write_text("image_uri,etag\n" + "/a.png,1\n" * 200_000 + ",1\n")
    pq.write_table(pa.table({"uri": ["/a.png"], "size_bytes": [1.5]}), root / "size.parquet")
    (root / "hole.csv").write_text("image_uri,y\n/a.png,1\n,2\n")
    (root / "size.csv").write_text("image_uri,size_bytes\n/a.png,big\n")
    (root / "double.csv").write_text("image_uri,image_uri\n/a.png,/b.png\n")
    (root / "two.csv").write_text("image_uri,mask_uri\n/i.png,/m1.png\n/i.png,/m2.png\n")
    with pytest.raises(error, match=message) as caught:
        list_images(*(uri.format(root=root) for uri in uris), masks=tuple(uri.format(root=root) for uri in masks))
    assert "key:secret" not in str(caught.value)


def test_a_split_without_a_split_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("image_uri\n/a.png\n")
    with pytest.raises(DataError, match="there is no column split"):
        list_images(tmp_path / "m.csv", split="val")


def test_relative_paths_of_a_list_are_refused_in_a_submitted_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "list.txt"
    path.write_text("/whole.png\npart.png\n")
    monkeypatch.chdir(tmp_path)
    assert [image.uri for image in list_images(path)] == [str(tmp_path / "part.png"), "/whole.png"]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({}))
    with pytest.raises(ConfigError, match=r"list\.txt, row 2: part\.png is a relative path"):
        list_images(path)


def test_a_file_name_that_is_not_utf8_is_refused(root: Path) -> None:
    Path(os.fsdecode(bytes(root) + b"/\xff.png")).touch()
    with pytest.raises(UnusableFileError, match=r"\\xff\.png.*rename"):
        list_images(root)
