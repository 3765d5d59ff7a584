"""Turns failures of workers into one line: segray's own errors unchanged, errors of Ray, and unexpected exceptions."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from segray.errors import ClusterError, SegrayError, StorageError

_SEE_LOGS = "rerun with SEGRAY_WORKER_LOGS=1 to see the workers' output"


@contextmanager
def named_failure(what: str, passed: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Convert an unexpected exception in the block to an error that says what failed; print the traceback.

    Args:
        what: The work, as the subject of the message: the stage, with fragment and image where known.
        passed: Types of exceptions that the caller handles; they are not converted.

    Raises:
        SegrayError: Raised in the block; it is not converted.
        ClusterError: Any other exception, with its type and message.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (SegrayError, *passed)):
            raise
        traceback.print_exc(file=sys.stderr)
        raise ClusterError(f"{what} failed: {describe_cause(error)}; {_SEE_LOGS}") from error


@contextmanager
def translated_ray_errors(what: str) -> Iterator[None]:
    """Convert Ray errors raised in the block to segray errors.

    Args:
        what: The work, as the subject of the message.

    Raises:
        SegrayError: The segray error that a worker raised, if Ray's error contains one.
        StorageError: A node's disk or object store is full.
        ClusterError: Any other error of Ray, with its cause.
    """
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError

    try:
        yield
    except (OutOfDiskError, ObjectStoreFullError) as error:
        raise StorageError(
            f"{what}: a node's disk or object store is full: {get_last_line(error)}; free some space; to resume, rerun "
            "the same command"
        ) from error
    except RayError as error:
        raise find_segray_error(error) or ClusterError(
            f"{what} failed: {describe_cause(error)}; {_SEE_LOGS}"
        ) from error


def find_segray_error(error: BaseException) -> SegrayError | None:
    """Return the segray error that a worker raised, unwrapped from Ray's errors, or None if there is none."""
    if isinstance(error, SegrayError) and not hasattr(error, "cause"):  # Ray's copies have a cause and a long text.
        return error
    for inner in _list_inner(error):
        if found := find_segray_error(inner):
            return found
    return None


def describe_cause(error: BaseException) -> str:
    """Return type and message of the innermost exception, as one line.

    Ray's own errors are described by their last line, where Ray states the reason.
    """
    from ray.exceptions import RayError

    while inner := _list_inner(error):
        error = inner[0]
    if isinstance(error, RayError):
        return get_last_line(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first_line = lines[0] if lines else ""  # Ray Data appends advice.
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def _list_inner(error: BaseException) -> list[BaseException]:
    """Return the exceptions that an exception wraps: those of Ray's errors, and the one that it was raised from."""
    failures = getattr(error, "worker_failures", None) or {}
    inner = [
        getattr(error, "cause", None),
        *failures.values(),
        getattr(error, "controller_failure", None),
        error.__cause__,
    ]
    return [one for one in inner if isinstance(one, BaseException) and one is not error]


def get_last_line(error: BaseException) -> str:
    """Return the last non-empty line of an error's text, where Ray states the reason."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
