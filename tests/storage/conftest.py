"""Fixture of the storage tests: a stub of S3."""

from collections.abc import Iterator

import pytest

from segray.storage import files
from tests.storage.stub_server import StubServer


@pytest.fixture(scope="module")
def s3_stub() -> Iterator[StubServer]:
    """A stub of S3 that the clients of this process use. They are created once, because that takes a while."""
    with StubServer() as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in {
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        files._open_store.cache_clear()
        yield server
    files._open_store.cache_clear()
