"""Ends a worker process that takes too long for an image, even if a C library hangs and holds Python's lock."""

import faulthandler
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import TextIO

_MAX_TIMEOUT_S = 1e7  # Longer than any run. The timer does not accept arbitrary numbers.
_running = Lock()


@contextmanager
def limited_time(timeout_s: float) -> Iterator[None]:
    """End this process, with exit code 1, if the block takes longer than ``timeout_s`` seconds.

    The ledger recognises from the time that passed that the image was too slow. The timer is a thread in C, because a
    thread in Python would wait for the interpreter's lock. There is one timer per process.

    Raises:
        RuntimeError: Such a block is already running in this process.
    """
    if not _running.acquire(blocking=False):
        raise RuntimeError("the time of two images cannot be limited at once in one process")
    try:
        faulthandler.dump_traceback_later(min(timeout_s, _MAX_TIMEOUT_S), exit=True, file=_open_null())
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    finally:
        _running.release()


@cache
def _open_null() -> TextIO:
    """Return where the timer writes its traceback; it needs a file that stays open."""
    return open(os.devnull, "w")
