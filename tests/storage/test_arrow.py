"""Stores that pyarrow reads: the contract of a store on pyarrow's own in memory, and one that cannot be reached."""

import time
import uuid

import pyarrow as pa
import pytest

from segray import storage
from segray.errors import ChangedFileError, MissingFileError, StorageError
from segray.storage.arrow import ArrowStore


@pytest.fixture
def base() -> str:
    return f"mock://{uuid.uuid4().hex}/folder"


def test_what_is_written_is_read_listed_and_found(base: str) -> None:
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
    assert storage.list_names(base) == {"x"}  # nothing is left of what was on the way
    with pytest.raises(ChangedFileError, match="its entity tag was"):
        storage.read_bytes(uri, found.etag)
    for _ in range(2):
        storage.remove_file(uri)
    assert not storage.exists(uri)


def test_what_is_not_there_is_missing(base: str) -> None:
    with pytest.raises(MissingFileError, match=rf"cannot read {base}/x: nothing is there"):
        storage.read_bytes(f"{base}/x")
    with pytest.raises(MissingFileError, match=rf"cannot list {base}/none: nothing is there"):
        list(storage.list_files(f"{base}/none"))
    assert storage.list_names(f"{base}/none") == set()


def test_a_store_that_cannot_be_reached_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself, Google's client tries for a quarter of an hour."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    monkeypatch.setattr("segray.storage.arrow.CLIENT_RETRY_FOR_S", 1)
    monkeypatch.setattr("segray.storage.store.RETRY_FOR_S", 1)
    begin = time.monotonic()
    with pytest.raises(StorageError, match=r"^cannot read gs://anonymous@nobody/x: .*the same call goes on$"):
        storage.read_bytes("gs://anonymous@nobody/x")
    assert time.monotonic() - begin < 20


def test_a_refusal_that_is_no_error_of_the_system_is_one_line() -> None:
    """Azure's client raises such a one if it finds no credentials; it looks for them on other machines too."""

    def refuse() -> None:
        raise pa.ArrowException("Failed to get token\nfrom anywhere")

    store = ArrowStore("mock", "nobody")
    with pytest.raises(StorageError, match=r"^cannot read mock://nobody/x: Failed to get token from anywhere$"):
        store._retry("read", "x", refuse)
