"""Normalize columns of URIs; only the unusual ones pass through Python."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from segray.config import require_absolute
from segray.errors import DataError
from segray.runtime.connect import is_submitted_job
from segray.storage import normalize_uri

_PASSWORD = r"^[^:/]*://[^/]*:[^/]*@"
_UNUSUAL_PATH = r"//|/\.(/|$)|/$"  # what ``normalize_uri`` changes in an absolute path


def normalize_uris(uris: pa.LargeStringArray, numbers: np.ndarray[Any, Any], where: str) -> pa.LargeStringArray:
    """Return URIs as ``normalize_uri`` spells them; nulls stay.

    Args:
        uris: The URIs.
        numbers: Numbers of their rows, for errors.
        where: URI of the file with these rows, for errors.

    Raises:
        DataError: A URI contains a password.
        ConfigError: In a submitted job, a URI is a path relative to the current folder.
    """
    if pc.any(pc.match_substring(uris, "@")).as_py():
        _refuse_passwords(uris, numbers, where)
    is_unusual = _find_unusual(uris)
    if not pc.any(is_unusual).as_py():
        return uris
    rows: Iterable[int] = numbers[is_unusual.to_numpy(zero_copy_only=False)]
    unusual = uris.filter(is_unusual).to_pylist()
    if is_submitted_job():
        for row, uri in zip(rows, unusual, strict=True):
            require_absolute({f"{where}, row {row}": uri})
    return pc.replace_with_mask(uris, is_unusual, pa.array(map(normalize_uri, unusual), uris.type))


def _find_unusual(uris: pa.LargeStringArray) -> pa.BooleanArray:
    """Return which URIs ``normalize_uri`` may change; calling it for each URI takes 20 times as long."""
    is_remote = pc.and_not(pc.match_substring(uris, "://"), pc.starts_with(uris, "file://"))
    is_unusual = pc.and_(is_remote, pc.ends_with(uris, "/"))
    if not pc.all(is_remote).as_py():
        is_path = pc.and_not(pc.starts_with(uris, "/"), pc.match_substring_regex(uris, _UNUSUAL_PATH))
        is_unusual = pc.or_(is_unusual, pc.invert(pc.or_(is_remote, is_path)))
    return is_unusual.fill_null(False)


def _refuse_passwords(uris: pa.LargeStringArray, numbers: np.ndarray[Any, Any], where: str) -> None:
    has_password = pc.match_substring_regex(uris, _PASSWORD).fill_null(False)
    if pc.any(has_password).as_py():
        row = numbers[pc.index(has_password, True).as_py()]
        raise DataError(
            f"{where}: row {row}: the URI contains a password, which would be stored with the results; remove it, and "
            "configure the credentials of this user and of each node"
        )
