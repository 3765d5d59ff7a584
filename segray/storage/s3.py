"""S3 and what speaks its protocol, through boto3: credentials, profiles, region, endpoint as AWS's tools read them.

Why not pyarrow's S3 client: its listings carry no entity tags and cannot be streamed, every read is two requests, a
small file is written by three, and a stream that breaks while being written may leave a part behind as if whole.
"""

import hashlib
import os
import re
import ssl
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import boto3
import botocore.session
import urllib3
from botocore import exceptions as boto
from botocore.config import Config
from botocore.configprovider import ConfiguredEndpointProvider
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

from segray.errors import MissingFileError, StorageError, UnusableFileError, flatten_message
from segray.storage.store import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, Content, StoredFile, TransientError, retrying

ResultT = TypeVar("ResultT")

_MAX_CONNECTIONS = 32
_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "BadDigest"} | {
    "XAmzContentSHA256Mismatch",  # like BadDigest: what arrived is not what was sent
    "ConditionalRequestConflict",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_CREDENTIAL_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "RequestTimeTooSkewed"}
_REGION_CODES = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_PERMISSION_CODES = {"AccessDenied", "AllAccessDisabled", "403"}
_CREDENTIAL_ERRORS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.TokenRetrievalError,
    boto.ProfileNotFound,
    boto.ConfigNotFound,
    boto.ConfigParseError,
    boto.SSOError,
)
_TRANSIENT_ERRORS = (
    boto.ConnectionError,
    boto.HTTPClientError,  # connections that time out or break
    boto.IncompleteReadError,
    boto.CredentialRetrievalError,  # the service that hands them out on this machine
    boto.FlexibleChecksumError,  # a byte flipped on the way, where the store keeps a checksum
    ResponseParserError,  # half an answer is no XML
    urllib3.exceptions.HTTPError,  # while a body is read, not all of them are wrapped
    ssl.SSLError,
)
_CHECK_MD5 = "SEGRAY_S3_CHECK_MD5"
_MD5 = re.compile(r"[0-9a-f]{32}")


class S3Store:
    """One bucket."""

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        self._client: Any = None
        self._lock = threading.Lock()

    def list(self, folder: str, recursive: bool, start: str) -> Iterator[StoredFile]:
        """See ``Store.list``. Keys that end in ``/`` are the markers of folders, not files."""
        prefix = f"{folder}/" if folder else ""
        is_empty = True
        for file in self._iterate(prefix + start, "" if recursive else "/"):
            is_empty = False
            if not file.uri.endswith("/"):
                yield file
        if is_empty and next(self._iterate_pages(prefix, "/", max_keys=1), None) is None:
            raise MissingFileError(f"cannot list {self._get_uri(folder)}: nothing is there; check the spelling")

    def _iterate(self, prefix: str, delimiter: str) -> Iterator[StoredFile]:
        for page in self._iterate_pages(prefix, delimiter):
            for entry in page.get("Contents", ()):
                yield self._describe(entry["Key"], entry["Size"], entry)

    def _iterate_pages(self, prefix: str, delimiter: str, max_keys: int = 1000) -> Iterator[dict[str, Any]]:
        """Yield the pages that hold anything."""
        options = {"Prefix": prefix, "MaxKeys": max_keys} | ({"Delimiter": delimiter} if delimiter else {})
        while True:
            page = self._call("list", self._get_uri(prefix), "list_objects_v2", **options)
            if page.get("Contents") or page.get("CommonPrefixes"):
                yield page
            if not page.get("IsTruncated"):
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def list_names(self, folder: str, folders: bool) -> set[str]:
        """See ``Store.list_names``."""
        prefix = f"{folder}/" if folder else ""
        kind, name = ("CommonPrefixes", "Prefix") if folders else ("Contents", "Key")
        entries = (entry for page in self._iterate_pages(prefix, "/") for entry in page.get(kind, ()))
        return {entry[name][len(prefix) :].rstrip("/") for entry in entries} - {""}

    def find(self, key: str) -> StoredFile | None:
        """See ``Store.find``."""
        try:
            answer = self._call("look at", self._get_uri(key), "head_object", Key=key)
        except MissingFileError:
            return None
        return self._describe(key, answer["ContentLength"], answer)

    def _describe(self, key: str, size_bytes: int, answer: dict[str, Any]) -> StoredFile:
        return StoredFile(self._get_uri(key), size_bytes, _get_etag(answer), answer["LastModified"].timestamp())

    def read(self, key: str) -> Content:
        """See ``Store.read``.

        Where the entity tag is the MD5 of the content, a byte flipped on the way is seen and the file read again.
        Elsewhere (KMS encryption, uploads in parts) it is seen only if the store keeps another checksum.
        """

        def get() -> Content:
            answer = self._client_or_new().get_object(Bucket=self._bucket, Key=key)
            data = answer["Body"].read()
            etag = _get_etag(answer)
            if etag and _MD5.fullmatch(etag) and not _is_encrypted(answer) and os.environ.get(_CHECK_MD5) != "0":
                md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
                if md5 != etag:
                    raise TransientError(
                        f"damaged on the way: its MD5 is {md5}, its entity tag {etag} (a store whose tags are no MD5 "
                        f"needs {_CHECK_MD5}=0)"
                    )
            return Content(data, etag)

        return self._retry("read", self._get_uri(key), get)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """See ``Store.read_range``."""

        def get() -> bytes:
            answer = self._client_or_new().get_object(Bucket=self._bucket, Key=key, Range=f"bytes={start}-{end - 1}")
            return bytes(answer["Body"].read())

        return self._retry("read", self._get_uri(key), get) if end > start else b""

    def write(self, key: str, content: bytes | memoryview) -> None:
        """See ``Store.write``: one PUT, which the store applies whole or not at all."""
        self._put(key, content)

    def create(self, key: str, content: bytes) -> bool:
        """See ``Store.create``. A store that knows no conditional PUT is asked first, which leaves a short gap."""
        try:
            self._put(key, content, IfNoneMatch="*")
        except _PreconditionError:
            return False
        except _UnknownRequestError:
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
            answer: dict[str, Any] = getattr(self._client_or_new(), operation)(Bucket=self._bucket, **arguments)
            return answer

        return self._retry(verb, uri, call)

    def _retry(self, verb: str, uri: str, act: Callable[[], ResultT]) -> ResultT:
        def act_or_explain() -> ResultT:
            try:
                return act()
            except ClientError as error:
                raise _explain(error, verb, uri, self._bucket) from error
            except _CREDENTIAL_ERRORS as error:
                raise StorageError(
                    f"cannot {verb} {uri}: no usable credentials: {flatten_message(error)}; "
                    "give this user, and the role of each node, access as for AWS's own tools"
                ) from error
            except _TRANSIENT_ERRORS as error:
                raise TransientError(flatten_message(error)) from error
            except boto.BotoCoreError as error:
                raise StorageError(f"cannot {verb} {uri}: {flatten_message(error)}") from error

        return retrying(verb, uri, act_or_explain)

    def _client_or_new(self) -> Any:
        with self._lock:  # clients may be shared by threads, but not made by two at once
            if self._client is None:
                self._client = _build_client()
            return self._client


class _PreconditionError(StorageError):
    """There is a file already."""


class _UnknownRequestError(StorageError):
    """The store does not know this kind of request."""


def find_place() -> tuple[str | None, str | None]:
    """Return the endpoint of S3, or None where it is AWS's own, and the region, as environment and profile say them.

    Raises:
        botocore.exceptions.BotoCoreError: ``AWS_PROFILE`` names what is not there.
    """
    session = botocore.session.Session()
    provider = ConfiguredEndpointProvider(session.full_config, session.get_scoped_config(), client_name="s3")
    return provider.provide(), os.environ.get("AWS_REGION") or session.get_config_variable("region")


def _build_client() -> Any:
    endpoint, region = find_place()
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=_MAX_CONNECTIONS,
        retries={"total_max_attempts": 1},  # one layer of retries: `retrying`, which covers bodies too
        request_checksum_calculation="when_required",  # stores of other makers know Content-MD5, few the newer ones
        # a bucket's name is a host's name at AWS; elsewhere hardly ever
        s3={"addressing_style": "path"} if endpoint else {},
    )
    session = botocore.session.Session()
    session.set_config_variable("metadata_service_num_attempts", 4)  # a cluster's workers all ask it at one moment
    return boto3.session.Session(botocore_session=session).client("s3", region, config=config)


def _get_etag(answer: dict[str, Any]) -> str | None:
    return str(answer.get("ETag", "")).strip('"') or None


def _is_encrypted(answer: dict[str, Any]) -> bool:
    """Say whether a file is stored such that its entity tag is not an MD5."""
    return "SSECustomerAlgorithm" in answer or str(answer.get("ServerSideEncryption", "")).startswith("aws:")


def _explain(error: ClientError, verb: str, uri: str, bucket: str) -> Exception:
    """Return what a refusal means, in one line that says what to do."""
    answer = error.response
    code = str(answer.get("Error", {}).get("Code", ""))
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    text = answer.get("Error", {}).get("Message") or code
    what = f"cannot {verb} {uri}: "
    if status == 501 or code == "NotImplemented":
        return _UnknownRequestError(f"{what}the store does not know this request ({text})")
    if status == 412 or code == "PreconditionFailed":
        return _PreconditionError(f"{what}there is one already")
    if code == "NoSuchBucket":
        return StorageError(f"{what}no such bucket: {bucket}; check its name and AWS_ENDPOINT_URL, or create it")
    # HEAD has no body; any other 404 that is not in S3's own words may be a gateway's
    if code == "NoSuchKey" or (status == 404 and verb == "look at"):
        return MissingFileError(f"{what}nothing is there; check the spelling, or create it first")
    if status >= 500 or code in ("404", "429") or code in _TRANSIENT_CODES:
        return TransientError(f"the store answers {status} {code}")
    if code in _EXPIRED_CODES:
        return StorageError(f"{what}the credentials have expired; renew them, then the same call goes on")
    if code in _CREDENTIAL_CODES:
        return StorageError(f"{what}the credentials are refused ({code}); check access key, secret key and clock")
    if code in _REGION_CODES:
        return StorageError(f"{what}wrong region ({code}: {flatten_message(Exception(text))}); set AWS_REGION")
    if code == "InvalidObjectState":
        return UnusableFileError(f"{what}it is archived ({text}); restore it")
    if code in ("KeyTooLongError", "InvalidURI"):
        return UnusableFileError(f"{what}{text}; rename it")
    if code == "400":  # to HEAD, which cannot say more
        return StorageError(f"{what}the store refuses the request; the credentials may have expired: renew them")
    if code in _PERMISSION_CODES or status in (401, 403):
        return StorageError(f"{what}permission denied ({code}); check the rights of these credentials")
    return StorageError(f"{what}{code}: {flatten_message(Exception(text))}")
