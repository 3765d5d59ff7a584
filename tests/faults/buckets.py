"""The bucket of the fault tests in each kind of store, and what tests do to it directly, without segray."""

from datetime import timedelta
from typing import Protocol

import obstore
from obstore.store import AzureStore

from tests.faults.object_store import SECRET_KEY, ObjectStore
from tests.storage.azurite import ACCOUNT, KEY, Azurite
from tests.storage.google_stub import GoogleBucket
from tests.storage.stub_server import StubServer

BUCKET = "faults"


class Bucket(Protocol):
    """A bucket in a store that listens at ``endpoint``; ``uri`` has no slash at its end; ``secret`` must not leak."""

    uri: str
    endpoint: str
    secret: str

    def build_environment(self, endpoint: str) -> dict[str, str]:
        """Return the variables with which segray finds store and credentials, at the store's or a proxy's endpoint."""

    def put(self, key: str, content: bytes) -> None:
        """Write a file."""

    def get(self, key: str) -> bytes:
        """Read a file."""

    def delete(self, key: str) -> None:
        """Remove a file."""

    def list_keys(self, prefix: str) -> list[str]:
        """Return the sorted keys that begin with a prefix, which ends with a slash."""


class S3Bucket:
    """A bucket of Swift; see ``Bucket``."""

    uri = f"s3://{BUCKET}"
    secret = SECRET_KEY

    def __init__(self, store: ObjectStore) -> None:
        self.endpoint = store.endpoint
        self._environment = store.environment
        self._client = store.client()

    def build_environment(self, endpoint: str) -> dict[str, str]:
        return {**self._environment, "AWS_ENDPOINT_URL": endpoint}

    def put(self, key: str, content: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def get(self, key: str) -> bytes:
        content: bytes = self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=key)

    def list_keys(self, prefix: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]


class AzureBucket:
    """A container of Azurite; see ``Bucket``."""

    uri = f"az://{BUCKET}"
    secret = KEY

    def __init__(self, azurite: Azurite) -> None:
        self.endpoint = azurite.endpoint
        self._azurite = azurite
        self._store = AzureStore(
            BUCKET,
            config={"account_name": ACCOUNT, "account_key": KEY, "endpoint": azurite.endpoint},
            client_options={"allow_http": True, "timeout": timedelta(seconds=60)},
        )

    def build_environment(self, endpoint: str) -> dict[str, str]:
        return self._azurite.build_environment(endpoint)

    def put(self, key: str, content: bytes) -> None:
        obstore.put(self._store, key, content, use_multipart=False)

    def get(self, key: str) -> bytes:
        return bytes(obstore.get(self._store, key).bytes())

    def delete(self, key: str) -> None:
        obstore.delete(self._store, key)

    def list_keys(self, prefix: str) -> list[str]:
        return sorted(meta["path"] for meta in obstore.list(self._store, prefix.rstrip("/")).collect())


class GoogleStubBucket:
    """A bucket of the stub of Google's API; see ``Bucket``."""

    uri = f"gs://{BUCKET}"
    secret = "secret-of-google"

    def __init__(self, server: StubServer, bucket: GoogleBucket) -> None:
        self.endpoint = server.endpoint
        self._bucket = bucket

    def build_environment(self, endpoint: str) -> dict[str, str]:
        return {"GOOGLE_BASE_URL": endpoint, "GOOGLE_BEARER_TOKEN": self.secret}

    def put(self, key: str, content: bytes) -> None:
        self._bucket.put(key, content)

    def get(self, key: str) -> bytes:
        return self._bucket.objects[key][0]

    def delete(self, key: str) -> None:
        del self._bucket.objects[key]

    def list_keys(self, prefix: str) -> list[str]:
        return sorted(key for key in list(self._bucket.objects) if key.startswith(prefix))
