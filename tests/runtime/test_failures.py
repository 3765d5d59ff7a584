"""Tests of segray.runtime.failures: every failure of a worker becomes one line that names its cause."""

import sys

import pytest
import ray
from ray import cloudpickle
from ray.data._internal.util import iterate_with_retry
from ray.exceptions import ObjectStoreFullError, RayTaskError, WorkerCrashedError
from ray.train import ControllerError, WorkerGroupError

from segray.errors import ClusterError, FaultKind, ImageFault, StorageError
from segray.runtime.failures import describe_cause, named_failure, translated_ray_errors


def fail() -> None:
    raise ImageFault(FaultKind.CHANGED, "one line")


@pytest.mark.usefixtures("ray_session")
def test_an_error_of_a_worker_is_raised_unchanged() -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(ImageFault) as caught, translated_ray_errors("trying"):
        ray.get(ray.remote(fail).remote())
    assert (str(caught.value), caught.value.kind) == ("one line", FaultKind.CHANGED)


def test_lines_that_ray_data_adds_to_an_error_are_not_shown() -> None:
    error = StorageError("cannot read s3://b/k: permission denied")
    error.args = (f"{error.args[0]}\nFailed to apply UDF transform after 1/1 attempts",)
    assert str(error) == "cannot read s3://b/k: permission denied"


def annotate(error: Exception) -> Exception:
    """Return an exception as Ray Data raises it in a worker: with advice on retries in its last line."""

    def iterate() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        list(iterate_with_retry(iterate, "apply UDF transform", match=[], max_attempts=1))
    assert "To change retry attempts" in str(caught.value.args)
    return caught.value


def chain(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


ODD = ValueError("odd")


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (ObjectStoreFullError("full"), StorageError, "trying: a node's disk or object store is full"),
        (WorkerCrashedError(), ClusterError, "trying failed: .*SEGRAY_WORKER_LOGS=1"),
        (RayTaskError("f", "trace\nKeyError", ODD), ClusterError, "^trying failed: ValueError: odd; rerun with"),
        (
            RayTaskError("f", "trace", annotate(OSError("page size overflows\nmore"))).as_instanceof_cause(),
            ClusterError,
            "^trying failed: OSError: page size overflows; rerun with",
        ),
        (
            RayTaskError("f", "trace", chain(RuntimeError("late"), chain(KeyError("middle"), ODD))),
            ClusterError,
            "^trying failed: ValueError: odd; rerun with",
        ),
        (RayTaskError("f", "trace", AssertionError()), ClusterError, "^trying failed: AssertionError; rerun with"),
    ],
    ids=["full", "crashed", "foreign", "annotated", "chained", "empty"],
)
def test_errors_of_ray_become_one_line(error: Exception, expected: type[Exception], message: str) -> None:
    with pytest.raises(expected, match=message) as caught, translated_ray_errors("trying"):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [WorkerGroupError("text", {1: ODD}), ControllerError(RayTaskError("f", "trace", ODD))]
)
def test_the_cause_of_failed_training_is_that_of_its_worker(error: Exception) -> None:
    assert describe_cause(error) == "ValueError: odd"


def test_an_unexpected_exception_is_named_and_its_traceback_printed(capsys: pytest.CaptureFixture[str]) -> None:
    expected = r"^decoding a.png failed: ValueError: odd; rerun with SEGRAY_WORKER_LOGS=1"
    outer, inner = named_failure("decoding fragment 3"), named_failure("decoding a.png")
    with pytest.raises(ClusterError, match=expected), outer, inner:
        raise ODD
    assert capsys.readouterr().err.count("Traceback") == 1


def test_errors_of_segray_and_those_that_the_caller_handles_are_not_converted() -> None:
    with pytest.raises(StorageError, match=r"^no disk$"), named_failure("writing"):
        raise StorageError("no disk")
    with pytest.raises(MemoryError), named_failure("writing", passed=(MemoryError,)):
        raise MemoryError
    with pytest.raises(ClusterError, match=r"^writing failed: MemoryError; rerun"), named_failure("writing"):
        raise MemoryError
    with pytest.raises(KeyboardInterrupt), named_failure("writing"):
        raise KeyboardInterrupt
