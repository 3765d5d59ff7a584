"""Translate errors of obstore to segray errors: one line with the reason and the remedy, without secrets."""

import re

from obstore.exceptions import InvalidPathError, PermissionDeniedError, UnauthenticatedError

from segray.errors import ForbiddenFileError, MissingFileError, StorageError, UnusableFileError
from segray.storage.redaction import describe_error
from segray.storage.retries import ThrottledError, TransientError

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_THROTTLING = re.compile(r"SlowDown|ServerBusy|TooManyRequests|RateLimitExceeded", re.IGNORECASE)
_NO_BUCKET = ("ContainerNotFound", "NoSuchBucket")
_BAD_CREDENTIALS = ("AuthenticationFailed", "InvalidAuthenticationInfo", "SignatureDoesNotMatch", "AccountIsDisabled")


def translate_error(error: Exception, verb: str, uri: str) -> Exception:
    """Return the segray error for an error of obstore, or ``TransientError`` if a retry may succeed.

    Args:
        error: The error of obstore.
        verb: The operation, for the message: "cannot VERB URI".
        uri: The file or folder, for the message.
    """
    text = str(error).partition("\n\nDebug source")[0]
    found_status, found_code = _STATUS.search(text), _CODE.search(text)
    status = int(found_status.group(1)) if found_status else 0
    code = found_code.group(1) if found_code else ""
    what = f"cannot {verb} {uri}: "
    if isinstance(error, FileNotFoundError) or status == 404:
        if code in _NO_BUCKET or verb == "list":
            return StorageError(f"{what}no such bucket or container; check its name, or create it")
        return MissingFileError(f"{what}no such file; check the spelling, or create it first")
    if isinstance(error, InvalidPathError | ValueError):
        return UnusableFileError(f"{what}{describe_reason(error)}; rename the file")
    if "token request" in text or "Credential" in text:
        return TransientError(
            f"no usable credentials: {describe_reason(error)}; configure credentials for this user and for each node"
        )
    if isinstance(error, UnauthenticatedError) or code in _BAD_CREDENTIALS:
        return StorageError(f"{what}the credentials were refused ({code or status}); renew them, or check them")
    if isinstance(error, PermissionDeniedError) or status == 403:
        kind = ForbiddenFileError if verb in ("read", "stat") else StorageError
        return kind(f"{what}permission denied ({code or status}); check the permissions of these credentials")
    return _translate_failure(error, status, code, what, verb)


def _translate_failure(error: Exception, status: int, code: str, what: str, verb: str) -> Exception:
    """Return the error for a request that failed for a reason other than the file and the credentials."""
    # Answers to HEAD have no body that states the reason.
    if status == 429 or _THROTTLING.search(code) or (status == 503 and verb == "stat"):
        return ThrottledError(f"the store throttles requests: it answered {status} {code}".rstrip())
    if status >= 500 or status == 408:
        return TransientError(f"the store answered {status} {code}".rstrip())
    if status == 409 and code == "BlobArchived":
        return UnusableFileError(f"{what}the file is archived; restore it")
    if status:
        return StorageError(f"{what}the store answered {status} {code}".rstrip())
    return TransientError(describe_reason(error))  # No answer.


def describe_reason(error: Exception) -> str:
    """Return the first line of a message of obstore, without what the store answered."""
    text = describe_error(error).partition(" Debug source")[0]
    return text.partition(": <")[0].partition(": {")[0]
