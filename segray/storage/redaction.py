"""Keep secrets out of error messages: libraries and stores may repeat what was sent to them."""

import os
import re

from segray.errors import flatten_message

_SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|SAS_KEY|ACCESS_KEY|ACCOUNT_KEY|MASTER_KEY|ENCRYPTION_KEY|CREDENTIAL", re.I
)
_PUBLIC_NAME = re.compile(r"(_ID|_FILE|_PATH|_DIR|_URL|_URI|_CREDENTIALS)$", re.I)  # Of an identifier, or a place.
_MIN_LENGTH = 8
_USER = re.compile(r"(https?://)[^/@\s]*@")
_QUERY = re.compile(r"(https?://[^\s?]*)\?[^\s)]*")  # May be a shared access signature.


def describe_error(error: BaseException) -> str:
    """Return the message of a library's exception as one line without secrets."""
    return redact(flatten_message(error))


def redact(text: str) -> str:
    """Return a text without the secrets of the environment, and without users and queries in its web addresses."""
    for name, value in os.environ.items():
        if len(value) >= _MIN_LENGTH and _SECRET_NAME.search(name) and not _PUBLIC_NAME.search(name):
            text = text.replace(value, "***")
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))
