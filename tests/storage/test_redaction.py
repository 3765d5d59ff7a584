"""Secrets never appear: in errors of all kinds of refusals and stores, also if a store repeats what was sent to it."""

import traceback
from collections.abc import Callable, Iterator

import pytest

from segray import storage
from segray.errors import StorageError
from segray.storage import files
from segray.storage.rate_limit import RateLimiter
from segray.storage.redaction import redact
from tests.storage.stub_server import Answer, Request, StubServer

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "identifier",
    "AWS_SECRET_ACCESS_KEY": "secret-of-aws",
    "AWS_SESSION_TOKEN": "secret-session",
    "AWS_REGION": "us-east-1",
    "GOOGLE_BEARER_TOKEN": "secret-bearer",
    "AZURE_STORAGE_ACCOUNT_NAME": "account",
    "AZURE_STORAGE_SAS_TOKEN": "sv=2026-01-01&sig=secret-signature",
}
SECRETS = ("secret-of-aws", "secret-session", "secret-bearer", "secret-signature")
URIS = ("s3://bucket/x", "gs://bucket/x", "az://box/x")
REFUSALS = [
    *((403, code) for code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthenticationFailed")),
    *((400, code) for code in ("ExpiredToken", "InvalidToken", "KMS.DisabledException", "InvalidURI", "Unheard")),
    *((404, code) for code in ("NoSuchBucket", "NoSuchKey", "ContainerNotFound", "Unheard")),
    *((503, code) for code in ("SlowDown", "ServerBusy", "Unheard")),
    *((301, "PermanentRedirect"), (401, "Unauthorized"), (409, "Unheard"), (412, "Unheard"), (429, ""), (500, "")),
    *((501, "NotImplemented"), (200, "Unheard")),
]
ACTS: dict[str, Callable[[str], object]] = {
    "read": storage.read_bytes,
    "stat": storage.find_file,
    "list": lambda uri: list(storage.list_files(uri)),
    "write": lambda uri: storage.write_bytes(uri, b"content"),
    "create": lambda uri: storage.create_bytes(uri, b"content"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[StubServer]:
    with StubServer() as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AZURE_STORAGE_ACCOUNT_KEY"):
            patch.delenv(name, raising=False)
        endpoints = {
            "AWS_ENDPOINT_URL": server.endpoint,
            "GOOGLE_BASE_URL": server.endpoint,
            "AZURE_STORAGE_ENDPOINT": f"{server.endpoint}/account",
        }
        for name, value in {**ENVIRONMENT, **endpoints}.items():
            patch.setenv(name, value)
        files._open_store.cache_clear()
        yield server
    files._open_store.cache_clear()


@pytest.fixture(autouse=True)
def _give_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RateLimiter, "wait_for_turn", lambda limiter: limiter.clock())
    monkeypatch.setattr("segray.storage.retries.RETRY_FOR_S", 0)
    monkeypatch.setattr("segray.storage.retries.RETRY_THROTTLED_FOR_S", 0)


def echo(request: Request) -> str:
    """Return everything that was sent."""
    return f"{request.method} {request.path}?{request.query} {dict(request.headers)}"


def require_no_secret(error: BaseException) -> None:
    shown = "".join(traceback.format_exception(error))  # As Ray logs it.
    assert "Error" in shown
    for secret in SECRETS:
        assert secret not in shown


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize(("status", "code"), REFUSALS)
def test_a_refusal_contains_no_secret(server: StubServer, status: int, code: str, uri: str) -> None:
    sent = []

    def answer(request: Request) -> Answer:
        sent.append(echo(request))
        message = echo(request).replace("<", "").replace("&", "&amp;")
        return Answer(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())

    server.answer = answer
    for act in ACTS.values():
        try:
            act(uri)
        except StorageError as error:
            require_no_secret(error)
    assert any(secret in "".join(sent) for secret in SECRETS)  # Otherwise this test could not fail.


@pytest.mark.parametrize("uri", URIS)
def test_a_broken_connection_contains_no_secret(server: StubServer, uri: str) -> None:
    server.answer = lambda request: Answer(200, b"short", {"Content-Length": "100", "Connection": "close"})
    for act in ACTS.values():
        try:
            act(uri)
        except StorageError as error:
            require_no_secret(error)


@pytest.mark.parametrize("uri", URIS)
def test_an_unreachable_store_contains_no_secret(uri: str, monkeypatch: pytest.MonkeyPatch, server: StubServer) -> None:
    address = "http://user:secret-session@127.0.0.1:1"
    for name in ("AWS_ENDPOINT_URL", "GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT"):
        monkeypatch.setenv(name, address)
    files._open_store.cache_clear()
    with pytest.raises(StorageError, match=r"^cannot read") as raised:
        storage.read_bytes(uri)
    require_no_secret(raised.value)
    files._open_store.cache_clear()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AZURE_STORAGE_ACCOUNT_KEY", "secret-of-aws: not base64!"),
        ("GOOGLE_SERVICE_ACCOUNT_KEY", '{"private_key": "secret-of-aws"}'),
    ],
)
def test_unusable_credentials_are_not_repeated(
    server: StubServer, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_SAS_TOKEN")
    monkeypatch.delenv("GOOGLE_BEARER_TOKEN")
    monkeypatch.setenv(name, value)
    files._open_store.cache_clear()
    with pytest.raises(StorageError) as raised:
        storage.read_bytes("az://box/x" if name.startswith("AZURE") else "gs://bucket/x")
    require_no_secret(raised.value)
    files._open_store.cache_clear()


def test_identifiers_and_places_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/home/me/credentials")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")
    text = "identifier /home/me/credentials /home/me/key.json s3://bucket/a?b.png"
    assert redact(text) == text
    assert redact("secret-session https://me:pw@host/x?sig=1 (a)") == "*** https://host/x (a)"
