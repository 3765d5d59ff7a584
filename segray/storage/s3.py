"""S3 and compatible stores through boto3, which reads credentials, profiles, region and endpoint as AWS's tools do.

pyarrow's S3 client is not used because its listings contain no entity tags and cannot be streamed, every read takes two
requests, a small file takes three to write, and a stream that breaks while writing may leave a partial file that looks
complete.
"""

import hashlib
import os
import re
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.configprovider import ConfiguredEndpointProvider

from segray.errors import MissingFileError
from segray.storage.parallel_listing import ParallelListing
from segray.storage.rate_limit import RateLimiter
from segray.storage.retries import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, TransientError, retrying
from segray.storage.s3_errors import PreconditionError, UnsupportedRequestError, call_translated
from segray.storage.s3_pages import S3Pages, UnsortedPageError, parse_entries_fast
from segray.storage.store import Content, StoredFile

ResultT = TypeVar("ResultT")

_MAX_CONNECTIONS = 32
_CHECK_MD5 = "SEGRAY_S3_CHECK_MD5"
_MD5 = re.compile(r"[0-9a-f]{32}")


class S3Store:
    """One bucket of S3 or a compatible store."""

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        self._client: Any = None
        self._lock = threading.Lock()
        self._limiter = RateLimiter()

    def list(self, folder: str, recursive: bool, start: str) -> Iterator[StoredFile]:
        """See ``Store.list``. Keys that end in ``/`` are folder markers, not files."""
        prefix = f"{folder}/" if folder else ""
        pages = self._open_pages(prefix + start)
        is_empty = True
        for file in _iterate_all(pages) if recursive else pages.iterate_files("/"):
            is_empty = False
            yield file
        if is_empty and not self._open_pages(prefix).exist():
            raise MissingFileError(f"cannot list {self._get_uri(folder)}: no such folder or prefix; check the spelling")

    def list_names(self, folder: str, folders: bool) -> set[str]:
        """See ``Store.list_names``."""
        return self._open_pages(f"{folder}/" if folder else "").list_names()[folders]

    def _open_pages(self, prefix: str) -> S3Pages:
        call = partial(self._call, "list", self._get_uri(prefix), "list_objects_v2")
        return S3Pages(self._get_uri(""), prefix, call)

    def find(self, key: str) -> StoredFile | None:
        """See ``Store.find``."""
        try:
            response = self._call("stat", self._get_uri(key), "head_object", Key=key)
        except MissingFileError:
            return None
        modified = response.get("LastModified")
        modified_s = modified.timestamp() if modified else 0.0
        return StoredFile(self._get_uri(key), response["ContentLength"], _get_etag(response), modified_s)

    def read(self, key: str) -> Content:
        """See ``Store.read``.

        Where the entity tag is the MD5 of the content, corruption in transit is detected and the file is read again.
        Otherwise (KMS encryption, multipart uploads) it is detected only if the store keeps another checksum.
        """

        def get() -> Content:
            response = self._get_client().get_object(Bucket=self._bucket, Key=key)
            data = response["Body"].read()
            etag = _get_etag(response)
            if etag and _MD5.fullmatch(etag) and not _is_encrypted(response) and os.environ.get(_CHECK_MD5) != "0":
                md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
                if md5 != etag:
                    raise TransientError(
                        f"corrupted in transit: its MD5 is {md5}, but its entity tag is {etag} (if the entity tags of "
                        f"this store are not MD5s, set {_CHECK_MD5}=0)"
                    )
            return Content(data, etag)

        return self._retry("read", self._get_uri(key), get)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """See ``Store.read_range``."""

        def get() -> bytes:
            response = self._get_client().get_object(Bucket=self._bucket, Key=key, Range=f"bytes={start}-{end - 1}")
            return bytes(response["Body"].read())

        return self._retry("read", self._get_uri(key), get) if end > start else b""

    def write(self, key: str, content: bytes | memoryview) -> None:
        """See ``Store.write``. One PUT, which the store applies atomically."""
        self._put(key, content)

    def create(self, key: str, content: bytes) -> bool:
        """See ``Store.create``. In stores without conditional PUT there is a short gap between check and write."""
        try:
            self._put(key, content, IfNoneMatch="*")
        except PreconditionError:
            return False
        except UnsupportedRequestError:
            if self.find(key) is not None:
                return False
            self._put(key, content)
        return True

    def _put(self, key: str, content: bytes | memoryview, **condition: str) -> None:
        md5 = b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
        self._call("write", self._get_uri(key), "put_object", Key=key, Body=bytes(content), ContentMD5=md5, **condition)

    def remove(self, key: str) -> None:
        """See ``Store.remove``."""
        self._call("remove", self._get_uri(key), "delete_object", Key=key)

    def _get_uri(self, key: str) -> str:
        return f"s3://{self._bucket}/{key}"

    def _call(self, verb: str, uri: str, operation: str, **arguments: Any) -> dict[str, Any]:
        def call() -> dict[str, Any]:
            response: dict[str, Any] = getattr(self._get_client(), operation)(Bucket=self._bucket, **arguments)
            return response

        return self._retry(verb, uri, call)

    def _retry(self, verb: str, uri: str, act: Callable[[], ResultT]) -> ResultT:
        return retrying(verb, uri, lambda: call_translated(act, verb, uri, self._bucket), self._limiter)

    def _get_client(self) -> Any:
        with self._lock:  # Threads may share a client, but must not create clients at the same time.
            if self._client is None:
                self._client = _build_client()
            return self._client


def _iterate_all(pages: S3Pages) -> Iterator[StoredFile]:
    """Yield all files: in parallel or, if the store ignores where a page is to begin, page by page."""
    last = before = ""
    try:
        for file in ParallelListing(pages):
            last = file.uri
            yield file
    except UnsortedPageError:
        for file in pages.iterate_files():
            if file.uri > last or file.uri <= before:  # The latter is an error that ``list_files`` reports.
                yield file
            before = file.uri


def find_endpoint() -> tuple[str | None, str | None]:
    """Return the endpoint of S3 (None for AWS's own) and the region, from the environment and the AWS profile.

    Raises:
        botocore.exceptions.BotoCoreError: ``AWS_PROFILE`` names a profile that does not exist.
    """
    session = botocore.session.Session()
    provider = ConfiguredEndpointProvider(session.full_config, session.get_scoped_config(), client_name="s3")
    return provider.provide(), os.environ.get("AWS_REGION") or session.get_config_variable("region")


def _build_client() -> Any:
    endpoint, region = find_endpoint()
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=_MAX_CONNECTIONS,
        retries={"total_max_attempts": 1},  # Only `retrying` retries, because it covers reading bodies too.
        request_checksum_calculation="when_required",  # Most other stores support Content-MD5, few the newer checksums.
        # AWS addresses buckets by host name; other stores rarely do.
        s3={"addressing_style": "path"} if endpoint else {},
    )
    session = botocore.session.Session()
    session.set_config_variable("metadata_service_num_attempts", 4)  # All workers of a node ask at the same moment.
    client = boto3.session.Session(botocore_session=session).client("s3", region, config=config)
    parse_entries_fast(client)
    return client


def _get_etag(response: dict[str, Any]) -> str | None:
    return str(response.get("ETag", "")).strip('"') or None


def _is_encrypted(response: dict[str, Any]) -> bool:
    """Return whether a file is encrypted in a way that makes its entity tag something other than an MD5."""
    return "SSECustomerAlgorithm" in response or str(response.get("ServerSideEncryption", "")).startswith("aws:")
