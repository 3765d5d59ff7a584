"""Tests of segray.storage.s3 on a stub: throttling, and refusals that a real store gives only to some users."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from segray import storage
from segray.errors import ForbiddenFileError, StorageError, UnusableFileError
from segray.storage import access, files
from segray.storage.rate_limit import RateLimiter
from tests.storage.stub_server import Answer, Request, StubServer

Answering = Callable[[Request], Answer]
Serve = Callable[[Answering], StubServer]
OTHER_FIELDS = "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag><Size>5</Size>"
SLOW_DOWN = ("SlowDown", "Please reduce your request rate.")


def refuse(status: int, code: str, message: str = "") -> Answer:
    return Answer(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())


@pytest.fixture
def serve(s3_stub: StubServer, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Return a function that sets the answers of the stub; the rate of requests is not limited yet."""

    def start(answer: Answering) -> StubServer:
        s3_stub.answer = answer
        s3_stub.requests.clear()
        return s3_stub

    monkeypatch.setattr(files._open_store("s3", "bucket"), "_limiter", RateLimiter())
    return start


def test_a_store_that_throttles_95_percent_for_a_while_is_used_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segray.storage.retries.RETRY_FOR_S", 0.5)  # Would be exceeded if it applied.
    begin = time.monotonic()
    chance = random.Random(0)

    def answer(request: Request) -> Answer:
        is_throttled = time.monotonic() - begin < 2 and chance.random() < 0.95
        return refuse(503, *SLOW_DOWN) if is_throttled else Answer(200, request.path.encode())

    stub = serve(answer)
    uris = [f"s3://bucket/{number}" for number in range(10)]
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(storage.read_bytes, uris))
    assert contents == [f"/bucket/{number}".encode() for number in range(10)]
    assert len(stub.requests) < 60  # Without a common limit, 8 threads send many more.
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (503, *SLOW_DOWN),
        (503, "ServiceUnavailable", "Please reduce your request rate."),
        (429, "TooManyRequests", ""),
        (429, "Unknown", ""),
        (503, "RequestLimitExceeded", ""),
        (400, "RequestLimitExceeded", ""),
        (400, "ThrottlingException", ""),
        (400, "Throttling", ""),
        (503, "SlowDownRead", ""),
        (400, "KMS.ThrottlingException", ""),
    ],
)
def test_throttling_is_recognised(
    serve: Serve, status: int, code: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segray.storage.retries.RETRY_THROTTLED_FOR_S", 0)
    serve(lambda request: refuse(status, code, message))
    for act in (lambda: storage.read_bytes("s3://bucket/x"), lambda: list(storage.list_files("s3://bucket"))):
        with pytest.raises(StorageError, match=f"the store throttles requests: it answered {status} {code}"):
            act()


def test_a_throttled_head_has_no_code(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.storage.retries.RETRY_FOR_S", 0)
    failures = iter([Answer(503), Answer(503)])
    serve(lambda request: next(failures, Answer(404)))
    assert not storage.exists("s3://bucket/x")


def test_a_broken_store_is_not_taken_for_a_throttling_one(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.storage.retries.RETRY_FOR_S", 0)
    serve(lambda request: Answer(503, b"<html>Service Unavailable</html>"))
    with pytest.raises(StorageError, match="cannot read s3://bucket/x: "):
        storage.read_bytes("s3://bucket/x")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "AccessDenied", ForbiddenFileError),
        (403, "AllAccessDisabled", ForbiddenFileError),
        (400, "KMS.DisabledException", ForbiddenFileError),
        (403, "Unknown", ForbiddenFileError),
        (403, "InvalidAccessKeyId", StorageError),
        (403, "SignatureDoesNotMatch", StorageError),
        (400, "ExpiredToken", StorageError),
        (403, "RequestExpired", StorageError),
        (401, "Unauthorized", StorageError),
        (403, "InvalidObjectState", UnusableFileError),
    ],
)
def test_a_file_is_forbidden_only_if_the_credentials_are_valid(
    serve: Serve, status: int, code: str, kind: type[StorageError]
) -> None:
    serve(lambda request: refuse(status, code))
    with pytest.raises(StorageError) as raised:
        storage.read_bytes("s3://bucket/x")
    assert type(raised.value) is kind
    with pytest.raises(StorageError) as raised:
        storage.write_bytes("s3://bucket/x", b"")
    assert not isinstance(raised.value, ForbiddenFileError)


def test_a_forbidden_head_is_a_forbidden_file(serve: Serve) -> None:
    serve(lambda request: Answer(403))
    for act in (storage.find_file, storage.open_for_reading):
        with pytest.raises(ForbiddenFileError, match=r"^cannot stat s3://bucket/x: permission denied \(403\)"):
            act("s3://bucket/x")


@pytest.mark.parametrize(("others", "can_read"), [(200, True), (403, False)])
def test_another_object_of_the_prefix_tells_whose_fault_a_refusal_is(serve: Serve, others: int, can_read: bool) -> None:
    entries = "".join(f"<Contents><Key>in/{name}</Key>{OTHER_FIELDS}</Contents>" for name in ("a", "b", "c"))

    def answer(request: Request) -> Answer:
        if request.path == "/bucket":
            return Answer(200, f"<ListBucketResult>{entries}</ListBucketResult>".encode())
        return Answer(206, b"1") if others == 200 and request.path == "/bucket/in/c" else refuse(403, "AccessDenied")

    access._readable_folders.clear()
    stub = serve(answer)
    with pytest.raises(ForbiddenFileError):
        storage.read_bytes("s3://bucket/in/a")
    assert storage.can_read_beside("s3://bucket/in/a") is can_read
    if can_read:
        stub.requests.clear()
        assert storage.can_read_beside("s3://bucket/in/b")
        assert not stub.requests
