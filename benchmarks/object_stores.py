"""Compare boto3, as segray uses it for S3, with obstore on the tests' object store (OpenStack Swift on loopback).

    python benchmarks/object_stores.py [--rounds 3]

Speed: 16 threads write and read objects of 100 KB, and one thread lists them; the clients take turns. Behaviour:
requests per read and per write, corruption in transit that is detected, keys that can be used, what an error says.
`make test-all` installs the object store.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import obstore
from measuring import report
from obstore.store import S3Store as ObstoreS3

from segray.storage import retries
from segray.storage.s3 import S3Store
from tests.faults.object_store import REGION, ObjectStore
from tests.faults.proxy import Action, FaultProxy, Rule

_BUCKET = "compare"
_SIZE_BYTES = 100_000
_NUM_OBJECTS = 400
_NUM_THREADS = 16
_KEYS = ("a b", "a#b", "a%20b", "a?b", "ü", "a/b", "a//b", "/lead", "folder/")


class Client(Protocol):
    """What is measured."""

    def put(self, key: str, content: bytes) -> None:
        """Write an object."""

    def get(self, key: str) -> bytes:
        """Read an object."""

    def list_keys(self, folder: str) -> list[str]:
        """List a folder."""


class Boto3Client:
    """segray's own store."""

    def __init__(self, endpoint: str) -> None:
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        self._store = S3Store(_BUCKET)
        self._store._get_client()

    def put(self, key: str, content: bytes) -> None:
        """Write an object."""
        self._store.write(key, content)

    def get(self, key: str) -> bytes:
        """Read an object."""
        return self._store.read(key).data

    def list_keys(self, folder: str) -> list[str]:
        """List a folder."""
        return [file.uri.removeprefix(f"s3://{_BUCKET}/") for file in self._store.list(folder, True, "")]


class ObstoreClient:
    """obstore without its own retries."""

    def __init__(self, endpoint: str, environment: dict[str, str]) -> None:
        config: Any = {
            "endpoint": endpoint,
            "region": REGION,
            "access_key_id": environment["AWS_ACCESS_KEY_ID"],
            "secret_access_key": environment["AWS_SECRET_ACCESS_KEY"],
            "virtual_hosted_style_request": False,
        }
        options: Any = {"allow_http": True}
        none: Any = {"max_retries": 0}
        self._store = ObstoreS3(_BUCKET, config=config, client_options=options, retry_config=none)

    def put(self, key: str, content: bytes) -> None:
        """Write an object."""
        obstore.put(self._store, key, content, use_multipart=False)

    def get(self, key: str) -> bytes:
        """Read an object."""
        return bytes(obstore.get(self._store, key).bytes())

    def list_keys(self, folder: str) -> list[str]:
        """List a folder."""
        return [meta["path"] for page in obstore.list(self._store, folder, chunk_size=1000) for meta in page]


def measure_rates(client: Client, name: str) -> dict[str, float]:
    """Return operations per second with all threads, and this process's CPU time for each, in ms."""
    keys = [f"{name}/{number:04}" for number in range(_NUM_OBJECTS)]
    content = os.urandom(_SIZE_BYTES)
    acts: dict[str, Callable[[str], object]] = {"put": lambda key: client.put(key, content), "get": client.get}
    rates = {}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for act_name, act in acts.items():
            wall, cpu = time.monotonic(), time.process_time()
            list(pool.map(act, keys))
            rates[f"{act_name}/s"] = _NUM_OBJECTS / (time.monotonic() - wall)
            rates[f"{act_name} CPU ms"] = (time.process_time() - cpu) * 1000 / _NUM_OBJECTS
    begin = time.monotonic()
    assert client.list_keys(name) == keys
    rates["listed keys/s"] = _NUM_OBJECTS / (time.monotonic() - begin)
    return rates


def examine(client: Client, proxy: FaultProxy, plain: Any) -> dict[str, str]:
    """Return how a client behaves, whose requests go through the proxy."""
    found = {}
    for name, act in (("write", lambda: client.put("x", b"content")), ("read", lambda: client.get("x"))):
        proxy.forget()
        act()
        found[f"requests per {name}"] = str(len(proxy.requests))
    proxy.set_rules(Rule(Action.FLIP_BYTE, "GET", times=1))
    try:
        content = client.get("x")
        found["flipped bit in a read"] = "read again" if content == b"content" else "not detected"
    except Exception as error:
        found["flipped bit in a read"] = f"{type(error).__name__}"
    found["keys"] = ", ".join(f"{key!r} {_try_key(client, key, plain)}" for key in _KEYS)
    proxy.set_rules(Rule(Action.FORBIDDEN))
    try:
        client.get("x")
    except Exception as error:
        found["access denied"] = " ".join(str(error).split())[:160]
    proxy.clear()
    return found


def _try_key(client: Client, key: str, plain: Any) -> str:
    """Return whether a client reads and lists the key that another client has written."""
    plain.put_object(Bucket=_BUCKET, Key=f"odd/{key}", Body=key.encode())
    reads = lists = False
    with suppress(Exception):
        reads = client.get(f"odd/{key}") == key.encode()
    with suppress(Exception):
        lists = f"odd/{key}" in client.list_keys("odd") or (key.endswith("/") and client.list_keys("odd") == [])
    plain.delete_object(Bucket=_BUCKET, Key=f"odd/{key}")
    return {(True, True): "ok", (True, False): "not listed", (False, True): "not read"}.get((reads, lists), "neither")


def main() -> None:
    """Measure and examine both clients."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    retries.RETRY_FOR_S = 2
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as root,
        ObjectStore(Path(root)) as store,
        FaultProxy(store.endpoint) as proxy,
    ):
        os.environ.update(store.environment)
        store.make_bucket(_BUCKET)
        plain = store.client()
        clients: dict[str, Client] = {
            "boto3": Boto3Client(store.endpoint),
            "obstore": ObstoreClient(store.endpoint, store.environment),
        }
        rates: dict[str, list[dict[str, float]]] = {name: [] for name in clients}
        for number in range(rounds):
            for name, client in clients.items():
                rates[name].append(measure_rates(client, f"{name}-{number}"))
        behaviour = {
            "boto3": examine(Boto3Client(proxy.endpoint), proxy, plain),
            "obstore": examine(ObstoreClient(proxy.endpoint, store.environment), proxy, plain),
        }
    rows = [
        [what, *(f"{statistics.median(one[what] for one in rates[name]):.1f}" for name in clients)]
        for what in rates["boto3"][0]
    ]
    rows += [[what, *(behaviour[name].get(what, "") for name in clients)] for what in behaviour["boto3"]]
    figures = {name: {"rounds": rates[name], "behaviour": behaviour[name]} for name in clients}
    report("object_stores", ["", *clients], rows, figures, "boto3", "obstore")


if __name__ == "__main__":
    main()
