"""Translate errors of S3 and of boto3 to segray errors: one line with the reason and the remedy."""

import re
import ssl
from collections.abc import Callable
from typing import TypeVar

import urllib3
from botocore import exceptions as boto
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

from segray.errors import ForbiddenFileError, MissingFileError, StorageError, UnusableFileError
from segray.storage.redaction import describe_error, redact
from segray.storage.retries import ThrottledError, TransientError

ResultT = TypeVar("ResultT")

_TRANSIENT_CODES = {"RequestTimeout", "InternalError", "ServiceUnavailable", "BadDigest"} | {
    "XAmzContentSHA256Mismatch",  # Like BadDigest: the content was corrupted in transit.
    "ConditionalRequestConflict",
}
_THROTTLING = re.compile(
    r"SlowDown|Throttl|TooManyRequests|(Request|Rate|Bandwidth)LimitExceeded|reduce your request rate", re.IGNORECASE
)
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_CREDENTIAL_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "RequestTimeTooSkewed"}
_REGION_CODES = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_PERMISSION_CODES = {"AccessDenied", "AllAccessDisabled"}
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
    boto.HTTPClientError,  # A connection timed out or broke.
    boto.IncompleteReadError,
    boto.CredentialRetrievalError,  # The machine's metadata service did not answer.
    boto.FlexibleChecksumError,  # Corrupted in transit, where the store keeps a checksum.
    ResponseParserError,  # A truncated response is not valid XML.
    urllib3.exceptions.HTTPError,  # botocore does not wrap all errors that occur while a body is read.
    ssl.SSLError,
)


class PreconditionError(StorageError):
    """The file exists already."""


class UnsupportedRequestError(StorageError):
    """The store does not support this kind of request."""


def call_translated(act: Callable[[], ResultT], verb: str, uri: str, bucket: str) -> ResultT:
    """Call ``act``, and convert its errors. They are not chained, because a store may repeat what was sent to it.

    Args:
        act: The operation.
        verb: What it does, for the message: "cannot VERB URI".
        uri: The file or prefix, for the message.
        bucket: Name of the bucket.

    Raises:
        TransientError: A retry may succeed.
        StorageError: A retry cannot succeed.
    """
    try:
        return act()
    except ClientError as error:
        raise _translate_refusal(error, verb, uri, bucket) from None
    except _CREDENTIAL_ERRORS as error:
        raise StorageError(
            f"cannot {verb} {uri}: no usable credentials: {describe_error(error)}; "
            "configure credentials for this user and for each node, as for the AWS CLI"
        ) from None
    except _TRANSIENT_ERRORS as error:
        raise TransientError(describe_error(error)) from None
    except RecursionError:  # boto3 follows redirects without a limit.
        raise StorageError(
            f"cannot {verb} {uri}: redirected in a circle; check AWS_REGION and AWS_ENDPOINT_URL"
        ) from None
    except boto.BotoCoreError as error:
        raise StorageError(f"cannot {verb} {uri}: {describe_error(error)}") from None


def _translate_refusal(error: ClientError, verb: str, uri: str, bucket: str) -> Exception:
    """Return the segray error for an error response: one line with the reason and the remedy."""
    response = error.response
    code = redact(str(response.get("Error", {}).get("Code", "")))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    text = redact(" ".join(str(response.get("Error", {}).get("Message") or code).split()))
    what = f"cannot {verb} {uri}: "
    if status == 501 or code == "NotImplemented":
        return UnsupportedRequestError(f"{what}the store does not support this request ({text})")
    if status == 412 or code == "PreconditionFailed":
        return PreconditionError(f"{what}the file exists already")
    if code == "NoSuchBucket":
        return StorageError(f"{what}no such bucket: {bucket}; check its name and AWS_ENDPOINT_URL, or create it")
    # Responses to HEAD have no body. Any other 404 without S3's own code may come from a gateway.
    if code == "NoSuchKey" or (status == 404 and verb == "stat"):
        return MissingFileError(f"{what}no such file; check the spelling, or create it first")
    # A throttled HEAD is indistinguishable from one to a broken store; the latter soon refuses other requests too.
    if _THROTTLING.search(code) or _THROTTLING.search(text) or status == 429 or (status == 503 and verb == "stat"):
        return ThrottledError(f"the store throttles requests: it answered {status} {code}")
    if status >= 500 or code == "404" or code in _TRANSIENT_CODES:
        return TransientError(f"the store answered {status} {code}")
    return _translate_final(code, status, text, what, verb)


def _translate_final(code: str, status: int, text: str, what: str, verb: str) -> StorageError:
    """Return the segray error for a refusal of an existing file that a retry does not resolve."""
    if code in _EXPIRED_CODES:
        return StorageError(f"{what}the credentials have expired; renew them; to resume, rerun the same command")
    if code in _CREDENTIAL_CODES:
        return StorageError(f"{what}the credentials were refused ({code}); check access key, secret key and clock")
    if code in _REGION_CODES:
        return StorageError(f"{what}wrong region ({code}: {text}); set AWS_REGION")
    if code == "InvalidObjectState":
        return UnusableFileError(f"{what}the file is archived ({text}); restore it")
    if code in ("KeyTooLongError", "InvalidURI"):
        return UnusableFileError(f"{what}{text}; rename it")
    if code == "400":  # A response to HEAD has no body that states the reason.
        return StorageError(f"{what}the store refused the request; the credentials may have expired: renew them")
    if status == 401:
        return StorageError(f"{what}the credentials were refused ({code}); renew them, or check them")
    if code in _PERMISSION_CODES or status == 403 or code.startswith("KMS."):
        kind = ForbiddenFileError if verb in ("read", "stat") else StorageError
        return kind(f"{what}permission denied ({code}); check the permissions of these credentials")
    return StorageError(f"{what}{code}: {text}")
