"""Normalize and split URIs: ``scheme://authority/key``, or a local path.

Keys are not percent-decoded, so ``s3://bucket/a%20b #1.png`` names exactly that key. Only ``file://`` URIs are decoded,
as RFC 8089 specifies.
"""

import os
from pathlib import Path
from urllib.parse import unquote

from segray.errors import UnusableFileError


def normalize_uri(uri: str) -> str:
    """Return a URI in the spelling that segray stores: absolute local paths, no ``file://``, no trailing slash.

    Raises:
        UnusableFileError: A ``file://`` URI names another host.
    """
    if uri.startswith("file://"):
        host, slash, path = uri.removeprefix("file://").partition("/")
        if host not in ("", "localhost"):
            raise UnusableFileError(
                f"cannot open {uri}: {host} is the name of a host there; write file:///path, or a path without file://"
            )
        uri = unquote(slash + path)
    if is_local(uri):
        return str(Path(os.path.expanduser(uri)).absolute())
    return uri.rstrip("/")


def is_local(uri: str) -> bool:
    """Return whether a URI is a local path."""
    return "://" not in uri or uri.startswith("file://")


def is_relative(uri: str) -> bool:
    """Return whether a URI is a path relative to the current folder."""
    return is_local(uri) and not uri.startswith(("/", "~", "file://"))


def split_uri(uri: str) -> tuple[str, str, str]:
    """Return scheme, authority and key of a URI; for a local path the first two are empty."""
    uri = normalize_uri(uri)
    if is_local(uri):
        return "", "", uri
    scheme, _, rest = uri.partition("://")
    authority, _, key = rest.partition("/")
    return scheme, authority, key


def split_azure_authority(authority: str) -> tuple[str, str, str]:
    """Return container, account and endpoint of an Azure URI; the last two are empty if it names only the container.

    ``abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/KEY`` names all three, ``az://CONTAINER/KEY`` only the container.
    """
    container, _, host = authority.partition("@")
    account, _, domain = host.partition(".")
    endpoint = f"https://{account}.blob.{domain.partition('.')[2]}" if domain else ""
    return container, account, endpoint


def join_uri(uri: str, *names: str) -> str:
    """Append path components to a URI."""
    return "/".join([uri.rstrip("/"), *names])


def get_file_name(uri: str) -> str:
    """Return the part of a URI after its last slash."""
    return uri.rsplit("/", 1)[-1]
