"""Tests of segray.storage.cloud on Azurite and on a stub of Google's XML API."""

import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from segray import storage
from segray.errors import ChangedFileError, MissingFileError, StorageError, UnusableFileError
from segray.storage import files
from segray.storage.arrow import open_filesystem
from tests.faults.proxy import Action, FaultProxy, Rule
from tests.storage.azurite import Azurite
from tests.storage.google_stub import GoogleBucket
from tests.storage.stub_server import StubServer

pytestmark = pytest.mark.slow  # Azurite needs Node.js, which only make test-faults installs packages for.
NAMES = ["a b.png", "a#b.png", "a%20b.png", "a?b.png", "a+b.png", "a&b=c.png", "ü/.x.png", "_y.png", "a.png", "a/b.png"]
NAMES += ["a-b.png", "sub/z.PNG", "sub-x.png", "\U0001f600.png"]
BUCKET = GoogleBucket("bucket")


@pytest.fixture(scope="module")
def google() -> Iterator[StubServer]:
    with StubServer(BUCKET.answer) as server:
        yield server


@pytest.fixture(params=["azure", "google"])
def base(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty folder in a store."""
    files._open_store.cache_clear()
    if request.param == "azure":
        azurite: Azurite = request.getfixturevalue("azurite")
        for name, value in azurite.build_environment().items():
            monkeypatch.setenv(name, value)
        container = f"box-{uuid.uuid4().hex}"
        azurite.make_container(container)
        yield f"az://{container}/in"
    else:
        monkeypatch.setenv("GOOGLE_BASE_URL", request.getfixturevalue("google").endpoint)
        monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "token")
        BUCKET.objects.clear()
        yield "gs://bucket/in"
    files._open_store.cache_clear()


def test_written_files_are_read_listed_and_found(base: str) -> None:
    for name in NAMES:
        storage.write_bytes(f"{base}/{name}", name.encode())
    listed = list(storage.list_files(base))
    assert [file.uri for file in listed] == sorted(f"{base}/{name}" for name in NAMES)
    for file in listed:
        content = storage.read_bytes(file.uri, file.etag)
        assert content.decode() == file.uri.removeprefix(f"{base}/")
        assert file.size_bytes == len(content)
        found = storage.find_file(file.uri)
        assert found is not None
        assert replace(found, modified_s=0) == replace(file, modified_s=0)
    direct = [name for name in NAMES if "/" not in name]
    assert [file.uri for file in storage.list_files(base, recursive=False)] == sorted(
        f"{base}/{name}" for name in direct
    )
    assert [file.uri for file in storage.list_files(base, start="su")] == [f"{base}/sub-x.png", f"{base}/sub/z.PNG"]
    assert [file.uri for file in storage.list_files(base, start="sub/z")] == [f"{base}/sub/z.PNG"]
    assert list(storage.list_files(base, start="suc")) == []
    assert storage.list_names(base) == set(direct)
    assert storage.list_names(base, folders=True) == {"a", "ü", "sub"}
    assert storage.list_names(f"{base}/none") == set()


def test_a_long_listing_is_complete(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.storage.cloud._PAGE_SIZE", 7)
    monkeypatch.setattr(BUCKET, "page_size", 3)
    uris = [f"{base}/{number:02}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda uri: storage.write_bytes(uri, b"1"), uris))
    assert [file.uri for file in storage.list_files(base)] == uris


def test_folder_markers_are_not_files(monkeypatch: pytest.MonkeyPatch, google: StubServer) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", google.endpoint)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "token")
    files._open_store.cache_clear()
    BUCKET.objects.clear()
    for key in ("in/", "in/a-b", "in/a/", "in/a/b", "in/empty", "in/x/", "in/x/y"):
        BUCKET.objects[key] = (b"" if key.endswith(("/", "empty")) else b"1", 1)
    assert [file.uri for file in storage.list_files("gs://bucket/in")] == [
        f"gs://bucket/in/{name}" for name in ("a-b", "a/b", "empty", "x/y")
    ]
    assert storage.list_names("gs://bucket/in") == {"a-b", "empty"}


def test_a_file_is_created_once_replaced_and_removed(base: str) -> None:
    uri = f"{base}/x"
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda number: storage.create_bytes(uri, b"%d" % number), range(8)))
    assert created.count(True) == 1
    assert storage.read_bytes(uri) == b"%d" % created.index(True)
    found = storage.find_file(uri)
    assert found is not None
    content = os.urandom(9_000_000)  # More than one part of a multipart upload.
    storage.write_bytes(uri, memoryview(content))
    assert storage.read_bytes(uri) == content
    with pytest.raises(ChangedFileError, match="its entity tag was"):
        storage.read_bytes(uri, found.etag)
    with storage.open_for_reading(uri) as file:
        file.seek(5_000_000)
        assert file.read(70_000) == content[5_000_000:5_070_000]
    for _ in range(2):
        storage.remove_file(uri)
    assert not storage.exists(uri)


def test_a_missing_file_folder_or_bucket_is_named(base: str) -> None:
    with pytest.raises(MissingFileError, match=rf"^cannot read {base}/none: no such file; check"):
        storage.read_bytes(f"{base}/none")
    with pytest.raises(MissingFileError, match=rf"^cannot list {base}/none: no such folder"):
        list(storage.list_files(f"{base}/none"))
    scheme = base.partition("://")[0]
    for act in (
        lambda uri: list(storage.list_files(uri)),
        storage.read_bytes,
        lambda uri: storage.write_bytes(uri, b""),
    ):
        with pytest.raises(StorageError, match="no such bucket or container") as raised:
            act(f"{scheme}://nobody/x")
        assert not isinstance(raised.value, MissingFileError)


@pytest.mark.parametrize("name", ["a//b", "/a", "a/../b", "."])
def test_a_name_that_obstore_would_change_is_refused(base: str, name: str) -> None:
    for act in (storage.read_bytes, lambda uri: storage.write_bytes(uri, b"")):
        with pytest.raises(UnusableFileError, match="; rename the file"):
            act(f"{base}/{name}")


@pytest.mark.parametrize("base", ["google"], indirect=True)  # Such a name cannot be written to Azurite.
def test_a_listing_with_such_a_name_is_refused(base: str) -> None:
    BUCKET.objects["in/a//b"] = (b"1", 1)
    with pytest.raises(UnusableFileError, match=r"cannot list gs://bucket/in: .*a//b.*rename the file"):
        list(storage.list_files(base))


TRANSIENT = (Action.UNAVAILABLE, Action.RESET, Action.CUT_BODY, Action.LOST_ANSWER)


@pytest.mark.parametrize("action", TRANSIENT)
def test_transient_errors_are_retried(azurite: Azurite, monkeypatch: pytest.MonkeyPatch, action: Action) -> None:
    container = f"box-{uuid.uuid4().hex}"
    azurite.make_container(container)
    with FaultProxy(azurite.endpoint) as proxy:
        for name, value in azurite.build_environment(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        files._open_store.cache_clear()
        content = os.urandom(5000)
        acts: list[tuple[Callable[[], object], object]] = [
            (lambda: storage.write_bytes(f"az://{container}/x", content), None),
            (lambda: storage.read_bytes(f"az://{container}/x"), content),
            (lambda: [file.size_bytes for file in storage.list_files(f"az://{container}")], [5000]),
        ]
        for act, expected in acts:
            proxy.forget()
            proxy.set_rules(Rule(action, times=2))
            assert act() == expected
            assert len(proxy.requests) == 3  # obstore itself does not retry.
    files._open_store.cache_clear()


def test_pyarrow_opens_the_same_files_for_checkpoints(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in azurite.build_environment().items():
        monkeypatch.setenv(name, value)
    files._open_store.cache_clear()
    container = f"box-{uuid.uuid4().hex}"
    azurite.make_container(container)
    storage.write_bytes(f"az://{container}/in/x", b"content")
    filesystem, path = open_filesystem(f"az://{container}/in/x")
    with filesystem.open_input_stream(path) as stream:
        assert stream.read() == b"content"
    files._open_store.cache_clear()


@pytest.mark.parametrize(
    ("authority", "parts"),
    [
        ("box", ("box", "", "")),
        ("box@me.dfs.core.windows.net", ("box", "me", "https://me.blob.core.windows.net")),
        ("box@me.blob.core.chinacloudapi.cn", ("box", "me", "https://me.blob.core.chinacloudapi.cn")),
    ],
)
def test_an_azure_uri_names_the_account_or_not(authority: str, parts: tuple[str, str, str]) -> None:
    assert storage.uris.split_azure_authority(authority) == parts
