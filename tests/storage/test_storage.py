"""Tests of segray.storage on a local disk: odd names, atomic writes, one-line errors."""

import errno
import os
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from segray import storage
from segray.errors import ChangedFileError, MissingFileError, StorageError, UnusableFileError
from segray.storage import files

ODD_NAMES = ["a b.png", "a%20b.png", "c#1.png", "d?x=1.png", "ü.png", ".e.png", "_f.png", "sub/a b.png"]


def test_odd_names_are_listed_read_and_written(tmp_path: Path) -> None:
    for name in ODD_NAMES:
        storage.write_bytes(storage.join_uri(str(tmp_path), name), name.encode())
    listed = {file.uri: file.size_bytes for file in storage.list_files(str(tmp_path), ["png"])}
    assert listed == {f"{tmp_path}/{name}": len(name.encode()) for name in ODD_NAMES}
    assert all(storage.read_bytes(uri).decode() == uri.removeprefix(f"{tmp_path}/") for uri in listed)


def test_uris_are_normalized_to_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    urls = (f"file://{tmp_path}/x%20y", f"file://localhost{tmp_path}/x%20y")
    for spelling in ("x y", "./x y", str(tmp_path / "x y"), f"{tmp_path}/x y/", *urls):
        assert storage.normalize_uri(spelling) == str(tmp_path / "x y")
    assert storage.normalize_uri("s3://bucket/a%20b/") == "s3://bucket/a%20b"
    with pytest.raises(UnusableFileError, match=r"cannot open file://x/y: x is the name of a host there; write"):
        storage.read_bytes("file://x/y")


def test_extensions_are_compared_case_insensitively(tmp_path: Path) -> None:
    for name in ("a.PNG", "b.jpg", "c.txt", "png"):
        (tmp_path / name).touch()
    found = {storage.get_file_name(file.uri) for file in storage.list_files(str(tmp_path), ["png", "jpg"])}
    assert found == {"a.PNG", "b.jpg"}


def test_a_write_replaces_the_whole_file_and_leaves_no_other(tmp_path: Path) -> None:
    uri = str(tmp_path / "new" / "file")
    storage.write_bytes(uri, b"first, longer")
    storage.write_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"
    assert storage.list_names(str(tmp_path / "new")) == {"file"}


def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StorageError, match=r"cannot write .*file: .*No space left"):
        storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_names(str(tmp_path)) == {"file"}


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    with pytest.raises(MissingFileError, match=f"cannot read {gone}"):
        storage.read_bytes(gone)
    with pytest.raises(MissingFileError, match=f"cannot list {gone}"):
        list(storage.list_files(gone))
    assert storage.list_names(gone) == set()
    assert not storage.exists(gone)
    storage.remove_file(gone)


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"")
    with pytest.raises(StorageError, match="file"):
        list(storage.list_files(str(tmp_path / "file")))


def test_an_unknown_store_is_named() -> None:
    with pytest.raises(StorageError, match="cannot open nostore://x"):
        storage.read_bytes("nostore://x/y")


@pytest.mark.parametrize("uri", ["abfs://box:pa55word@me.dfs.core.windows.net/x", "hdfs://me:pa55word@host:8020/x"])
def test_a_password_in_a_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(
        StorageError, match="the URI contains a password, which would be stored with the results"
    ) as raised:
        storage.read_bytes(uri)
    assert "pa55word" not in str(raised.value)


def test_s3_keys_are_not_decoded() -> None:
    assert storage.split_uri("s3://bucket/a%20b #1?.png") == ("s3", "bucket", "a%20b #1?.png")
    assert storage.split_uri("s3://bucket/a//b/") == ("s3", "bucket", "a//b")
    assert storage.split_uri("s3://bucket") == ("s3", "bucket", "")


def test_creating_never_replaces_a_file_with_or_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("linked", "copied"):
        uri = str(tmp_path / name)
        assert storage.create_bytes(uri, b"1")
        assert not storage.create_bytes(uri, b"2")
        assert storage.read_bytes(uri) == b"1"

        def refuse(source: object, target: object) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr("os.link", refuse)
    assert storage.list_names(str(tmp_path)) == {"linked", "copied"}


def test_a_file_written_during_a_read_has_another_entity_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    found = storage.find_file(str(path))
    assert found is not None
    assert storage.read_bytes(str(path), found.etag) == b"1"
    real = os.fstat
    calls: list[int] = []

    def write_after_the_first_call(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        calls.append(descriptor)
        if len(calls) == 1:
            path.write_bytes(b"22")
            calls.append(descriptor)  # Writing calls fstat as well.
        return status

    monkeypatch.setattr("os.fstat", write_after_the_first_call)
    with pytest.raises(ChangedFileError, match=r"has changed: its entity tag was .* and is now .* to "):
        storage.read_bytes(str(path), found.etag)
    monkeypatch.undo()
    with pytest.raises(ChangedFileError, match="has changed: its entity tag was"):
        storage.read_bytes(str(path), found.etag)


def test_symbolic_links_are_followed_without_loops(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.png").touch()
    (tmp_path / "in" / "a.png").touch()
    (tmp_path / "in" / "sub" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "sub" / "out").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "nowhere.png").symlink_to(tmp_path / "gone")
    (tmp_path / "in" / "itself.png").symlink_to(tmp_path / "in" / "itself.png")
    names = [file.uri.removeprefix(f"{tmp_path}/in/") for file in storage.list_files(str(tmp_path / "in"))]
    assert names == ["a.png", "sub/out/b.png"]
    assert storage.list_names(str(tmp_path / "in"), folders=True) == {"sub"}


@pytest.mark.parametrize("obstacle", ["file", "link", "folder"])
def test_creating_a_file_at_an_unusable_path_is_refused(tmp_path: Path, obstacle: str) -> None:
    uri = str(tmp_path / "out" / "part")
    if obstacle == "file":
        (tmp_path / "out").touch()
    elif obstacle == "link":
        (tmp_path / "out").symlink_to(tmp_path / "unmounted")
    else:
        (tmp_path / "out" / "part").mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot write"):
        storage.create_bytes(uri, b"")


def test_only_old_temporary_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    for name in (".run.json.x.tmp", "images/.part-1.parquet.y.tmp", "plan/.z.tmp", "images/part-3.parquet"):
        storage.write_bytes(str(tmp_path / name), b"1")
        os.utime(tmp_path / name, (0, 0))
    storage.write_bytes(str(tmp_path / "images/.part-2.parquet.x.tmp"), b"1")
    storage.sweep_folder(str(tmp_path))
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == ["images/.part-2.parquet.x.tmp", "images/part-3.parquet"]


def test_an_unsorted_listing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = [storage.StoredFile(f"{tmp_path}/{name}.png", 1, None, 0) for name in "ba"]
    monkeypatch.setattr("segray.storage.local.LocalStore.list", lambda *arguments: iter(files))
    with pytest.raises(StorageError, match=r"returned .*a\.png after .*b\.png, expected sorted keys; use a manifest"):
        list(storage.list_files(str(tmp_path)))


def test_columns_are_read_again_if_a_page_checksum_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.parquet"
    table = pa.table({"x": pa.array(range(20_000), pa.int64()), "y": ["a"] * 20_000})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    real = files._RangeReader.readinto
    reads: list[int] = []

    def flip(reader: files._RangeReader, buffer: memoryview) -> int:
        size = real(reader, buffer)
        reads.append(size)
        if len(reads) == damaged:
            buffer[size // 2] ^= 1
        return size

    monkeypatch.setattr(files._RangeReader, "readinto", flip)
    for damaged in range(1, 8):
        reads.clear()
        assert storage.read_columns(str(path), ["x"])["x"].to_pylist() == list(range(20_000)), damaged
    damaged = 0
    with pytest.raises(StorageError, match=r"table\.parquet: .*: no column z; "):
        storage.read_columns(str(path), ["x", "z"])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StorageError, match=r"table\.parquet: damaged, or not a Parquet file"):
        storage.read_columns(str(path), ["x"])


def test_a_folder_is_removed_with_its_contents_only(tmp_path: Path) -> None:
    for name in ("run/a.bin", "run/sub/b c.bin", "run/.hidden", "runner/c.bin"):
        storage.write_bytes(str(tmp_path / name), b"1")
    storage.remove_folder(str(tmp_path / "run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runner"]
    storage.remove_folder(str(tmp_path / "run"))  # Removing a missing folder is not an error.
    assert (tmp_path / "runner" / "c.bin").exists()
