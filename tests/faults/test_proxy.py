"""Tests of the fault proxy in front of the real store: what passes unchanged, and what clients see of each fault."""

import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, ResponseStreamingError

from tests.faults.object_store import ObjectStore
from tests.faults.proxy import REFUSALS, Action, Call, FaultProxy, Point, Request, Rule

ODD_KEYS = ["a b", "a#b", "a%20b", "a?b", "ü/.x", "_y", "a//b", "/c", "d/", "e+f", "g&h=i"]
BODY = bytes(range(256)) * 1000

PUT_IN_A_PROCESS = """\
import boto3, sys
boto3.client("s3").put_object(Bucket=sys.argv[1], Key=sys.argv[2], Body=bytes(1_000_000))
"""


@pytest.fixture
def client(object_store: ObjectStore, proxy: FaultProxy) -> Any:
    return object_store.client(proxy.endpoint)


@pytest.fixture
def bucket(object_store: ObjectStore) -> str:
    name = f"proxy-{uuid.uuid4().hex}"
    object_store.make_bucket(name)
    return name


@pytest.fixture
def list_stored(object_store: ObjectStore, bucket: str) -> Callable[[], set[str]]:
    """Return a function that lists the keys in the store, bypassing the proxy."""
    direct = object_store.client()
    return lambda: {entry["Key"] for entry in direct.list_objects_v2(Bucket=bucket).get("Contents", ())}


def read(client: Any, bucket: str, key: str) -> bytes:
    data: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    return data


def put_unsigned(client: Any, bucket: str, key: str, body: bytes | Iterable[bytes]) -> None:
    """Put a body that the signature does not cover, which boto3 itself never does."""
    parameters = {"Bucket": bucket, "Key": key, "ContentType": "text/plain"}
    url = client.generate_presigned_url("put_object", parameters)
    urllib.request.urlopen(
        urllib.request.Request(url, body, {"Content-Type": parameters["ContentType"]}, method="PUT")
    ).close()


def test_odd_keys_pass_unchanged(proxy: FaultProxy, client: Any, bucket: str) -> None:
    for key in ODD_KEYS:
        client.put_object(Bucket=bucket, Key=key, Body=key.encode() * 1000)
    listed = client.list_objects_v2(Bucket=bucket)["Contents"]
    assert [entry["Key"] for entry in listed] == sorted(ODD_KEYS)
    for key in ODD_KEYS:
        assert read(client, bucket, key) == key.encode() * 1000
        head = client.head_object(Bucket=bucket, Key=key)
        assert head["ContentLength"] == len(key.encode()) * 1000
        client.delete_object(Bucket=bucket, Key=key)
    assert "Contents" not in client.list_objects_v2(Bucket=bucket)

    for operation, status in (("PUT", 200), ("GET", 200), ("HEAD", 200), ("DELETE", 204)):
        seen = [request for request in proxy.requests if request.operation == operation]
        assert [request.key for request in seen] == ODD_KEYS
        assert {request.status for request in seen} == {status}
    assert [request.key for request in proxy.requests if request.operation == "LIST"] == ["", ""]


def test_errors_of_the_store_pass_unchanged(object_store: ObjectStore, proxy: FaultProxy, bucket: str) -> None:
    client = object_store.client(proxy.endpoint)
    client.put_object(Bucket=bucket, Key="k", Body=BODY)
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=bucket, Key="k", Body=BODY * 20, IfNoneMatch="*")
    with pytest.raises(ClientError, match="404"):
        client.head_object(Bucket=bucket, Key="none")
    stranger = object_store.client(proxy.endpoint, aws_secret_access_key="wrong")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        stranger.get_object(Bucket=bucket, Key="k")
    assert [request.status for request in proxy.requests] == [200, 412, 404, 403]
    assert read(client, bucket, "k") == BODY


def test_a_chunked_body_is_stored_completely(object_store: ObjectStore, proxy: FaultProxy, bucket: str) -> None:
    parts = [b"first", b"second" * 20_000, b"last"]
    put_unsigned(object_store.client(proxy.endpoint), bucket, "k", iter(parts))  # An iterator has no known length.
    assert read(object_store.client(), bucket, "k") == b"".join(parts)


@pytest.mark.parametrize("action", [Action.UNAVAILABLE, Action.FORBIDDEN, Action.EXPIRED])
def test_refused_requests_do_not_reach_the_store(
    action: Action, proxy: FaultProxy, client: Any, bucket: str, list_stored: Callable[[], set[str]]
) -> None:
    status, code, _ = REFUSALS[action]
    proxy.set_rules(Rule(action))
    requests: list[tuple[Callable[..., object], dict[str, Any]]] = [
        (client.put_object, {"Key": "k", "Body": BODY}),
        (client.get_object, {"Key": "k"}),
        (client.list_objects_v2, {}),
    ]
    for send, arguments in requests:
        with pytest.raises(ClientError) as caught:
            send(Bucket=bucket, **arguments)
        assert caught.value.response["Error"]["Code"] == code
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    with pytest.raises(ClientError, match=str(status)):
        client.head_object(Bucket=bucket, Key="k")
    assert {request.status for request in proxy.requests} == {status}
    proxy.clear()
    assert list_stored() == set()
    client.put_object(Bucket=bucket, Key="k", Body=BODY)
    assert len({request.peer_port for request in proxy.requests}) == 1  # The connection stays open after refusals.


def test_a_reset_request_does_not_reach_the_store(
    proxy: FaultProxy, client: Any, bucket: str, list_stored: Callable[[], set[str]]
) -> None:
    proxy.set_rules(Rule(Action.RESET))
    with pytest.raises(ConnectionClosedError) as caught:
        client.put_object(Bucket=bucket, Key="k", Body=BODY)
    assert isinstance(caught.value.kwargs["error"].args[1], ConnectionResetError)
    assert list_stored() == set()
    assert [request.status for request in proxy.requests] == [None]


def test_a_write_with_a_lost_response_is_stored(
    proxy: FaultProxy, client: Any, bucket: str, list_stored: Callable[[], set[str]]
) -> None:
    proxy.set_rules(Rule(Action.LOST_ANSWER, "PUT"))
    with pytest.raises(ConnectionClosedError):
        client.put_object(Bucket=bucket, Key="k", Body=BODY)
    assert list_stored() == {"k"}
    assert [request.status for request in proxy.requests] == [None]
    assert read(client, bucket, "k") == BODY


def test_clients_detect_a_cut_body(proxy: FaultProxy, client: Any, bucket: str) -> None:
    client.put_object(Bucket=bucket, Key="k", Body=BODY)
    proxy.set_rules(Rule(Action.CUT_BODY))
    body = client.get_object(Bucket=bucket, Key="k")["Body"]
    assert body.read(len(BODY) // 2) == BODY[: len(BODY) // 2]
    with pytest.raises(ResponseStreamingError, match="IncompleteRead"):
        body.read()
    with pytest.raises(ConnectionClosedError):
        client.head_object(Bucket=bucket, Key="k")


def test_a_flipped_byte_differs_in_one_byte(
    object_store: ObjectStore, proxy: FaultProxy, client: Any, bucket: str
) -> None:
    client.put_object(Bucket=bucket, Key="k", Body=BODY)
    proxy.set_rules(Rule(Action.FLIP_BYTE, key="k"))
    got = read(client, bucket, "k")
    assert [index for index in range(len(BODY)) if got[index] != BODY[index]] == [len(BODY) // 2]
    assert len(got) == len(BODY)
    with pytest.raises(ClientError, match="XAmzContentSHA256Mismatch"):  # boto3's signature covers the body.
        client.put_object(Bucket=bucket, Key="k", Body=BODY)
    assert read(object_store.client(), bucket, "k") == BODY

    put_unsigned(client, bucket, "k", BODY)
    assert read(object_store.client(), bucket, "k") == got


def test_rules_affect_only_matching_requests(proxy: FaultProxy, client: Any, bucket: str) -> None:
    def find_affected(keys: list[str]) -> list[str]:
        proxy.forget()
        for key in keys:
            with suppress(ClientError):
                client.put_object(Bucket=bucket, Key=key, Body=b"x")
        return [request.key for request in proxy.requests if request.status == 503]

    keys = [f"{kind}{index}" for index in range(5) for kind in "ab"]
    proxy.set_rules(Rule(Action.UNAVAILABLE, "PUT", "^a", nth=2))
    assert find_affected(keys) == ["a1"]
    assert proxy.count("PUT") == 10
    assert proxy.count("PUT", "^b") == 5
    assert proxy.count("GET") == 0
    proxy.set_rules(Rule(Action.UNAVAILABLE, key="b[1-9]", times=2), Rule(Action.UNAVAILABLE, "GET"))
    assert find_affected(keys) == ["b1", "b2"]
    rule = Rule(Action.UNAVAILABLE, probability=0.3)
    with FaultProxy(f"http://{proxy.upstream}", [rule], seed=1) as one, FaultProxy("", [rule], seed=1) as other:
        decisions = [[p.begin(Request("GET", "k", 0, 0))[1] for _ in range(1000)] for p in (one, other)]
    assert decisions[0] == decisions[1]
    assert 250 < decisions[0].count(Action.UNAVAILABLE) < 350


def test_a_put_of_a_killed_client_stores_nothing(
    object_store: ObjectStore, proxy: FaultProxy, bucket: str, list_stored: Callable[[], set[str]]
) -> None:
    found = []

    def kill(request: Request) -> None:
        found.append(request.find_peer_pid())
        request.kill_peer()

    proxy.set_rules(Rule(Call(kill, "during"), "PUT"))
    command = [sys.executable, "-c", PUT_IN_A_PROCESS, bucket, "k"]
    environment = {**object_store.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
    with subprocess.Popen(command, env=environment) as process:
        assert process.wait(30) == -signal.SIGKILL
    assert found == [process.pid]
    assert [(request.operation, request.key, request.status) for request in proxy.requests] == [("PUT", "k", None)]
    assert list_stored() == set()


def test_hooks_run_before_during_and_after_a_request(
    object_store: ObjectStore, proxy: FaultProxy, client: Any, bucket: str, list_stored: Callable[[], set[str]]
) -> None:
    seen: list[tuple[int | None, set[str]]] = []
    cases: list[tuple[Point, set[str]]] = [("before", set()), ("during", set()), ("after", {"k"})]
    for point, stored in cases:
        proxy.set_rules(Rule(Call(lambda request: seen.append((request.status, list_stored())), point), "PUT"))
        client.put_object(Bucket=bucket, Key="k", Body=BODY)
        assert seen.pop() == (None, stored)
        assert list_stored() == {"k"}
        object_store.client().delete_object(Bucket=bucket, Key="k")


def test_an_error_in_a_hook_is_raised_on_exit(object_store: ObjectStore, bucket: str) -> None:
    def fail(request: Request) -> None:
        raise ValueError(f"not {request.key}")

    with (
        pytest.raises(ValueError, match="not k"),
        FaultProxy(object_store.endpoint, [Rule(Call(fail))]) as proxy,
        pytest.raises(ConnectionClosedError),
    ):
        read(object_store.client(proxy.endpoint), bucket, "k")
