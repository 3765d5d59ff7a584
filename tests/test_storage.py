"""Files by URI: odd names, atomic writes, one line for every refusal."""

from pathlib import Path

import pytest

from segray import storage
from segray.errors import MissingFileError, StorageError

ODD_NAMES = ["a b.png", "a%20b.png", "c#1.png", "d?x=1.png", "ü.png", ".e.png", "_f.png", "sub/a b.png"]


def test_odd_names_are_listed_read_and_written(tmp_path: Path) -> None:
    for name in ODD_NAMES:
        storage.write_bytes(storage.join_uri(str(tmp_path), name), name.encode())
    listed = {file.uri: file.size_bytes for file in storage.list_files(str(tmp_path), ["png"])}
    assert listed == {f"{tmp_path}/{name}": len(name.encode()) for name in ODD_NAMES}
    assert all(storage.read_bytes(uri).decode() == uri.removeprefix(f"{tmp_path}/") for uri in listed)


def test_uris_have_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for spelling in ("x y", "./x y", str(tmp_path / "x y"), f"file://{tmp_path}/x%20y", f"{tmp_path}/x y/"):
        assert storage.normalize_uri(spelling) == str(tmp_path / "x y")
    assert storage.normalize_uri("s3://bucket/a%20b/") == "s3://bucket/a%20b"


def test_extensions_are_taken_in_any_case(tmp_path: Path) -> None:
    for name in ("a.PNG", "b.jpg", "c.txt", "png"):
        (tmp_path / name).touch()
    found = {storage.get_file_name(file.uri) for file in storage.list_files(str(tmp_path), ["png", "jpg"])}
    assert found == {"a.PNG", "b.jpg"}


def test_a_write_replaces_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
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


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
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


def test_s3_keys_are_taken_as_they_are() -> None:
    assert storage.split_uri("s3://bucket/a%20b #1?.png") == ("s3", "bucket", "a%20b #1?.png")
    assert storage.split_uri("s3://bucket/a//b/") == ("s3", "bucket", "a//b")
    assert storage.split_uri("s3://bucket") == ("s3", "bucket", "")
