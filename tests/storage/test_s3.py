"""Tests of segray.storage.s3 on a real store: odd keys, listings, atomic and conditional writes, checksums, errors."""

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from segray import storage
from segray.errors import ChangedFileError, MissingFileError, StorageError
from segray.storage import files, s3_pages
from segray.storage.arrow import open_filesystem
from tests.faults.object_store import ObjectStore
from tests.faults.proxy import REFUSALS, Action, FaultProxy, Rule

BUCKET = "storage"
KEYS = [
    *("a b.png", "a#b.png", "a%20b.png", "a?b.png", "a+b.png", "a&b=c.png", "ü/.x.png", "_y.png", "a//b.png"),
    *("/lead.png", "a.png", "a/b.png", "sub/z.PNG", "sub-x.png"),
]


@pytest.fixture(scope="module")
def bucket(object_store: ObjectStore) -> str:
    object_store.make_bucket(BUCKET)
    for key in KEYS:
        object_store.client().put_object(Bucket=BUCKET, Key=f"in/{key}", Body=key.encode())
    for marker in ("in/", "in/sub/", "in/folder.png/"):
        object_store.client().put_object(Bucket=BUCKET, Key=marker, Body=b"")
    return f"s3://{BUCKET}"


@pytest.fixture(autouse=True)
def _client(object_store: ObjectStore, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the clients of this process go through the proxy, with new clients for each test."""
    for name, value in {**object_store.environment, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
        monkeypatch.setenv(name, value)
    files._open_store.cache_clear()
    yield
    files._open_store.cache_clear()


def test_odd_keys_are_listed_sorted_and_read(bucket: str) -> None:
    listed = list(storage.list_files(f"{bucket}/in"))
    assert [file.uri for file in listed] == sorted(f"{bucket}/in/{key}" for key in KEYS)  # Without folder markers.
    for file in listed:
        assert storage.read_bytes(file.uri, file.etag).decode() == file.uri.removeprefix(f"{bucket}/in/")
        assert storage.find_file(file.uri) == file
        assert time.time() - 3600 < file.modified_s < time.time() + 60


def test_a_prefix_is_a_folder(bucket: str) -> None:
    assert [file.uri for file in storage.list_files(f"{bucket}/in/sub/")] == [f"{bucket}/in/sub/z.PNG"]
    with pytest.raises(MissingFileError, match="cannot list"):
        list(storage.list_files(f"{bucket}/in/su"))
    direct = storage.list_files(f"{bucket}/in", ["png"], recursive=False, start="a")
    assert {file.uri.removeprefix(f"{bucket}/in/") for file in direct} == {
        key for key in KEYS if key.startswith("a") and "/" not in key
    }
    assert storage.list_names(f"{bucket}/in", folders=True) == {"a", "ü", "sub", "folder.png"}
    assert {"a b.png", "sub-x.png"} < storage.list_names(f"{bucket}/in")


@pytest.mark.parametrize("page_size", [1, 3])
def test_a_listing_of_several_pages_is_complete(bucket: str, page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_pages, "PAGE_SIZE", page_size)
    assert [file.uri for file in storage.list_files(f"{bucket}/in")] == sorted(f"{bucket}/in/{key}" for key in KEYS)
    assert storage.list_names(f"{bucket}/in", folders=True) == {"a", "ü", "sub", "folder.png"}


def test_a_write_is_one_request_and_replaces_the_whole_file(bucket: str, proxy: FaultProxy) -> None:
    uri = f"{bucket}/out/a #1%20.bin"
    for content in (b"first, longer", b"second", bytes(9_000_000)):
        proxy.forget()
        storage.write_bytes(uri, memoryview(content))
        assert [request.operation for request in proxy.requests] == ["PUT"]
        assert storage.read_bytes(uri) == content
    storage.remove_file(uri)
    storage.remove_file(uri)
    for name in ("gone/a", "gone/sub/b c", "goner/c"):
        storage.write_bytes(f"{uri}/{name}", b"1")
    storage.remove_folder(f"{uri}/gone")
    storage.remove_folder(f"{uri}/gone")
    assert [file.uri for file in storage.list_files(uri)] == [f"{uri}/goner/c"]
    storage.remove_folder(uri)
    assert storage.find_file(uri) is None


def test_creating_a_file_never_replaces_one(bucket: str) -> None:
    uri = f"{bucket}/new"
    assert storage.create_bytes(uri, b"1")
    assert not storage.create_bytes(uri, b"2")
    assert storage.read_bytes(uri) == b"1"


def test_in_a_store_without_conditional_writes_creating_checks_first(bucket: str, proxy: FaultProxy) -> None:
    uri = f"{bucket}/asked"
    for content, is_created in ((b"1", True), (b"2", False)):
        proxy.forget()
        proxy.set_rules(Rule(Action.NOT_IMPLEMENTED, "PUT", times=1))  # The conditional PUT.
        assert storage.create_bytes(uri, content) is is_created
        operations = [request.operation for request in proxy.requests]
        assert operations == ["PUT", "HEAD", "PUT"][: 3 if is_created else 2]
    assert storage.read_bytes(uri) == b"1"


def test_a_whole_parquet_file_is_read_with_one_request(bucket: str, proxy: FaultProxy) -> None:
    buffer = io.BytesIO()
    table = pa.table({name: range(100) for name in "abc"})
    pq.write_table(table, buffer, write_page_checksum=True)
    storage.write_bytes(f"{bucket}/table.parquet", buffer.getvalue())
    proxy.forget()
    assert storage.read_columns(f"{bucket}/table.parquet") == table
    assert [request.operation for request in proxy.requests] == ["GET"]
    assert storage.read_columns(f"{bucket}/table.parquet", ["b"]) == table.select(["b"])


def test_parts_of_a_file_are_read_by_position(bucket: str, proxy: FaultProxy) -> None:
    uri = f"{bucket}/parts"
    content = os.urandom(1_000_000)
    storage.write_bytes(uri, content)
    with storage.open_for_reading(uri) as file:
        file.seek(-10, os.SEEK_END)
        assert file.read() == content[-10:]
        file.seek(500_000)
        assert file.read(70_000) == content[500_000:570_000]
    with pytest.raises(MissingFileError, match=r"cannot read .*none"):
        storage.open_for_reading(f"{bucket}/none")


def test_a_file_that_changed_since_it_was_listed_is_refused(bucket: str) -> None:
    uri = f"{bucket}/changing"
    storage.write_bytes(uri, b"1")
    found = storage.find_file(uri)
    assert found is not None
    storage.write_bytes(uri, b"2")
    with pytest.raises(ChangedFileError, match=r"changing has changed: its entity tag was \w+ and is now \w+"):
        storage.read_bytes(uri, found.etag)


@pytest.mark.parametrize("action", [a for a in Action if a is Action.UNAVAILABLE or a not in REFUSALS])
def test_transient_errors_are_retried(bucket: str, proxy: FaultProxy, action: Action) -> None:
    proxy.set_rules(Rule(action, "PUT", times=2), Rule(action, "GET", times=2))
    content = os.urandom(5000)
    storage.write_bytes(f"{bucket}/retried", content)
    assert storage.read_bytes(f"{bucket}/retried") == content
    assert proxy.count("PUT") == 3
    assert proxy.count("GET") == 3
    if action is not Action.FLIP_BYTE:  # A flipped byte in a listing is detected only if the XML becomes invalid.
        proxy.set_rules(Rule(action, "LIST", times=2))
        assert len(list(storage.list_files(f"{bucket}/in"))) == len(KEYS)
        assert proxy.count("LIST") == 3


def test_the_md5_check_can_be_disabled_for_stores_with_other_entity_tags(
    bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{bucket}/tag", b"abcd")
    proxy.set_rules(Rule(Action.FLIP_BYTE, "GET"))
    monkeypatch.setattr("segray.storage.retries.RETRY_FOR_S", 1)
    with pytest.raises(StorageError, match=r"tag: corrupted in transit: .*set SEGRAY_S3_CHECK_MD5=0"):
        storage.read_bytes(f"{bucket}/tag")
    monkeypatch.setenv("SEGRAY_S3_CHECK_MD5", "0")
    assert storage.read_bytes(f"{bucket}/tag") == b"abbd"


@pytest.mark.parametrize(
    ("action", "message"), [(Action.FORBIDDEN, r"permission denied \(AccessDenied\)"), (Action.EXPIRED, "have expired")]
)
def test_a_refusal_is_not_retried(bucket: str, proxy: FaultProxy, action: Action, message: str) -> None:
    proxy.set_rules(Rule(action))
    acts: dict[str, Callable[[], object]] = {
        "GET": lambda: storage.read_bytes(f"{bucket}/in/a.png"),
        "PUT": lambda: storage.write_bytes(f"{bucket}/x", b""),
        "LIST": lambda: list(storage.list_files(f"{bucket}/in")),
    }
    for operation, act in acts.items():
        proxy.forget()
        with pytest.raises(StorageError, match=rf"^cannot \w+ {bucket}/.*{message}"):
            act()
        assert [request.operation for request in proxy.requests] == [operation]


@pytest.mark.parametrize(
    ("action", "patience", "message"),
    [
        (Action.UNAVAILABLE, "RETRY_THROTTLED_FOR_S", r"the store throttles requests: it answered 503 SlowDown"),
        (Action.RESET, "RETRY_FOR_S", r"Connection"),
    ],
)
def test_an_unavailable_store_is_reported_after_the_retries(
    bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, action: Action, patience: str, message: str
) -> None:
    monkeypatch.setattr(f"segray.storage.retries.{patience}", 4)
    proxy.set_rules(Rule(action))
    begin = time.monotonic()
    with pytest.raises(StorageError, match=rf"{message}.* \(\d+ attempts in \d s\); .*to resume once"):
        storage.read_bytes(f"{bucket}/in/a.png")
    assert time.monotonic() - begin < 15
    assert proxy.count("GET") > 3


@pytest.mark.parametrize(
    ("change", "uri", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "in", r"credentials were refused \(SignatureDoesNotMatch\)"),
        ({"AWS_PROFILE": "nobody"}, "in", r"no usable credentials: .*\(nobody\) could not be found"),
        ({"AWS_SHARED_CREDENTIALS_FILE": "{garbage}"}, "in", "no usable credentials: Unable to parse"),
        ({"AWS_SHARED_CREDENTIALS_FILE": "/nowhere"}, "in", "no usable credentials: Unable to locate credentials"),
        ({}, "../nobucket", "no such bucket: nobucket; check its name and AWS_ENDPOINT_URL"),
        ({}, "../No_Bucket!", "Invalid bucket name"),
        ({}, "nowhere", "no such folder or prefix; check the spelling"),
        ({"AWS_REGION": "eu-west-1"}, "in", None),  # boto3 repeats the request in the region that the store names.
    ],
    ids=["secret", "profile", "garbage", "none", "bucket", "name", "prefix", "region"],
)
def test_a_user_mistake_gives_a_one_line_error(
    bucket: str, tmp_path_factory: pytest.TempPathFactory, change: dict[str, str], uri: str, message: str | None
) -> None:
    garbage = tmp_path_factory.mktemp("aws") / "garbage"
    garbage.write_text("no [section\n")
    environment = {**os.environ, "HOME": str(garbage.parent)}
    environment |= {name: value.format(garbage=garbage) for name, value in change.items()}
    if any(name in change for name in ("AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE")):
        environment = {k: v for k, v in environment.items() if k not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    where = f"{bucket}/{uri}" if not uri.startswith("..") else f"s3://{uri[3:]}/in"
    code = (
        "import sys; from segray import cli, storage as s; cli.run(lambda: print(len(list(s.list_files(sys.argv[1])))))"
    )
    done = subprocess.run([sys.executable, "-c", code, where], env=environment, capture_output=True, text=True)
    if message is None:
        assert (done.returncode, done.stdout) == (0, f"{len(KEYS)}\n"), done.stderr
        return
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert re.match(rf"error: cannot list {re.escape(where)}/?: .*{message}", done.stderr), done.stderr


def test_endpoint_and_region_of_a_profile_apply_to_files_and_to_checkpoints(
    bucket: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = f"[services here]\ns3 =\n  endpoint_url = {proxy.endpoint}\n"
    (tmp_path / "config").write_text(f"[default]\nregion = us-east-1\nservices = here\n{services}")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    assert storage.read_bytes(f"{bucket}/in/a.png") == b"a.png"
    filesystem, path = open_filesystem(f"{bucket}/in/a.png")
    with filesystem.open_input_stream(path) as stream:
        assert stream.read() == b"a.png"
