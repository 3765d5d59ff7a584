"""Tests of segray.storage.arrow: the interface of a store on pyarrow's in-memory store."""

import uuid

import pyarrow as pa
import pytest

from segray import storage
from segray.errors import ChangedFileError, MissingFileError, StorageError
from segray.storage import files
from segray.storage.arrow import ArrowStore


@pytest.fixture
def base() -> str:
    return f"mock://{uuid.uuid4().hex}/folder"


def test_written_files_are_read_listed_and_found(base: str) -> None:
    for name in ("sub/b c#%20.PNG", "sub.txt", "a.png", "späť.png"):
        storage.write_bytes(f"{base}/{name}", name.encode())
    files = list(storage.list_files(base))
    names = ["a.png", "späť.png", "sub.txt", "sub/b c#%20.PNG"]
    assert [file.uri for file in files] == [f"{base}/{name}" for name in names]
    for file in files:
        assert storage.find_file(file.uri) == file
        content = storage.read_bytes(file.uri, file.etag)
        assert content.decode() == file.uri.removeprefix(f"{base}/")
        assert file.size_bytes == len(content)
    assert [file.uri for file in storage.list_files(base, ["png"], recursive=False)] == [
        f"{base}/a.png",
        f"{base}/späť.png",
    ]
    assert [file.uri for file in storage.list_files(base, start="su")] == [file.uri for file in files[2:]]
    assert storage.list_names(base) == {"a.png", "sub.txt", "späť.png"}
    assert storage.list_names(base, folders=True) == {"sub"}
    assert storage.find_file(f"{base}/sub") is None
    with storage.open_for_reading(files[2].uri) as file_object:
        file_object.seek(4)
        assert file_object.read(2) == b"tx"


def test_a_file_is_replaced_created_once_and_removed(base: str) -> None:
    uri = f"{base}/x"
    assert storage.create_bytes(uri, b"first")
    assert not storage.create_bytes(uri, b"second")
    found = storage.find_file(uri)
    assert found is not None
    storage.write_bytes(uri, b"longer than that")
    assert storage.list_names(base) == {"x"}  # No temporary file is left.
    with pytest.raises(ChangedFileError, match="its entity tag was"):
        storage.read_bytes(uri, found.etag)
    for _ in range(2):
        storage.remove_file(uri)
    assert not storage.exists(uri)


def test_a_failed_write_leaves_no_temporary_file(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{base}/x", b"old")
    store = files._open_store("mock", base.split("/")[2])
    assert isinstance(store, ArrowStore)
    real = store._filesystem

    class Broken:
        def move(self, source: str, target: str) -> None:
            raise OSError("no space")

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    monkeypatch.setattr("segray.storage.retries.RETRY_FOR_S", 0)
    monkeypatch.setattr(store, "_filesystem", Broken())
    with pytest.raises(StorageError, match=r"cannot write .*/x: no space"):
        storage.write_bytes(f"{base}/x", b"new")
    assert storage.list_names(base) == {"x"}
    assert storage.read_bytes(f"{base}/x") == b"old"


def test_a_missing_file_or_folder_is_named(base: str) -> None:
    with pytest.raises(MissingFileError, match=rf"cannot read {base}/x: no such file or folder"):
        storage.read_bytes(f"{base}/x")
    with pytest.raises(MissingFileError, match=rf"cannot list {base}/none: no such file or folder"):
        list(storage.list_files(f"{base}/none"))
    assert storage.list_names(f"{base}/none") == set()


def test_an_arrow_exception_becomes_one_line() -> None:
    """Azure's client raises one if it finds no credentials; a real one would search for them on other hosts too."""

    def refuse() -> None:
        raise pa.ArrowException("Failed to get token\nfrom anywhere")

    store = ArrowStore("mock", "nobody")
    with pytest.raises(StorageError, match=r"^cannot read mock://nobody/x: Failed to get token from anywhere$"):
        store._retry("read", "x", refuse)
