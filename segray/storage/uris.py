"""The spelling of URIs: ``scheme://authority/key``, or a local path.

Keys are taken as they are: nothing is percent-decoded, so ``s3://bucket/a%20b #1.png`` names exactly that key. Only
``file://`` URIs are decoded, as their standard says.
"""

import os
from pathlib import Path
from urllib.parse import unquote


def normalize_uri(uri: str) -> str:
    """Return the one spelling of a URI that segray stores: absolute local paths, no ``file://``, no trailing slash."""
    if uri.startswith("file://"):
        uri = unquote(uri.removeprefix("file://"))
    if is_local(uri):
        return str(Path(os.path.expanduser(uri)).absolute())
    return uri.rstrip("/")


def is_local(uri: str) -> bool:
    """Say whether a URI is a path of this machine."""
    return "://" not in uri or uri.startswith("file://")


def is_relative(uri: str) -> bool:
    """Say whether a URI is a path that depends on the current folder."""
    return is_local(uri) and not uri.startswith(("/", "~", "file://"))


def split_uri(uri: str) -> tuple[str, str, str]:
    """Return scheme, authority and key of a URI; a local path is all key."""
    uri = normalize_uri(uri)
    if is_local(uri):
        return "", "", uri
    scheme, _, rest = uri.partition("://")
    authority, _, key = rest.partition("/")
    return scheme, authority, key


def join_uri(uri: str, *names: str) -> str:
    """Append path components to a URI."""
    return "/".join([uri.rstrip("/"), *names])


def get_file_name(uri: str) -> str:
    """Return the part of a URI after its last slash."""
    return uri.rsplit("/", 1)[-1]
