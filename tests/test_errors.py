"""Exceptions: exit codes, one-line messages, and the description and remedy of each fault kind."""

import copy

import pytest

from segray import errors
from segray.errors import FaultKind, ImageFault, SegrayError

EXIT_CODES = {
    "BundleError": 1,
    "ChangedFileError": 4,
    "ClusterError": 1,
    "ConfigError": 2,
    "DataError": 1,
    "ForbiddenFileError": 4,
    "ImageFault": 1,
    "MissingFileError": 4,
    "RunMismatchError": 2,
    "SegrayError": 1,
    "StorageError": 4,
    "StoppedByErrorRows": 5,
    "TooManyErrorRows": 3,
    "TrainingError": 1,
    "UnusableFileError": 4,
}


def test_every_exception_has_its_documented_exit_code() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, SegrayError)]
    assert {error.__name__: error.exit_code for error in classes} == EXIT_CODES
    for error in classes:
        assert error is SegrayError or f"Exit code {error.exit_code}." in (error.__doc__ or ""), error


@pytest.mark.parametrize("kind", FaultKind)
def test_every_fault_kind_has_a_description_and_a_remedy(kind: FaultKind) -> None:
    assert kind == kind.value == str(kind)
    assert FaultKind(kind.value) is copy.deepcopy(kind) is kind
    for text in (kind.description, kind.remedy):
        assert text[0].isupper()
        assert text[-1] == "."


def test_a_message_is_one_line() -> None:
    assert str(ImageFault(FaultKind.TRUNCATED, "cut off\nadded by Ray Data", "copy it")) == "cut off"
