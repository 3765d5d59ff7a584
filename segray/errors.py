"""Every error that segray raises on purpose, and the exit code that each one gives the process.

    SegrayError                 1
    ├── ConfigError             2   a setting is wrong: names the setting
    ├── DataError               1   images, masks or a manifest are wrong: names the file and the remedy
    │   └── ImageFault          1   one image cannot be used: becomes an error row when segmenting
    ├── BundleError             1   a bundle is damaged, or of another version
    ├── RunMismatchError        2   an output folder belongs to another model, configuration or listing
    ├── TrainingError           1   training cannot go on (a loss that is not finite, a worker lost too often)
    ├── TooManyErrorRows        3   a run is finished, and more of its images are error rows than was allowed
    ├── ClusterError            1   Ray cannot be reached, or a worker failed in a way that segray has no name for
    └── StorageError            4   the world is at fault: permission, network, disk; try again once it is mended
        ├── MissingFileError    4   nothing is at this URI
        ├── ChangedFileError    4   something else is at this URI than there was
        └── UnusableFileError   4   this one file cannot be opened: its name, or it is archived

A message says, in one line, what was got, what was expected, and what to do.
"""

from enum import StrEnum


def flatten_message(error: BaseException) -> str:
    """Return the text of a foreign error in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class SegrayError(Exception):
    """Base of all errors a user of segray can meet."""

    exit_code = 1

    def __str__(self) -> str:
        return super().__str__().partition("\n")[0]  # one line: to a worker's error Ray Data adds lines of its own


class ConfigError(SegrayError):
    """A setting is unknown, has the wrong type or contradicts another one."""

    exit_code = 2


class DataError(SegrayError):
    """Images, masks or a manifest are not what the configuration says."""


class FaultKind(StrEnum):
    """Closed list of reasons for which a planned image becomes an error row (column ``error_kind``)."""

    UNREADABLE = "unreadable"
    TRUNCATED = "truncated"
    UNSUPPORTED = "unsupported"
    TOO_LARGE = "too_large"
    MISSING = "missing"
    CHANGED = "changed"
    MASK_MISSING = "mask_missing"
    MASK_MISMATCH = "mask_mismatch"
    FAILED = "failed"


class ImageFault(DataError):
    """One image, or its mask, cannot be used; all others can.

    Args:
        kind: Why.
        message: What was got, and what was expected.
        remedy: What to do; empty where the message says it, or where there is nothing but another file.
    """

    def __init__(self, kind: FaultKind, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.kind = kind
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[type["ImageFault"], tuple[FaultKind, str, str]]:
        # exceptions with several arguments do not pickle by themselves
        return type(self), (self.kind, self.message, self.remedy)


class BundleError(SegrayError):
    """A model bundle is damaged, incomplete or written by an incompatible version."""


class RunMismatchError(SegrayError):
    """An output folder already holds a run of another model, configuration or listing."""

    exit_code = 2


class TrainingError(SegrayError):
    """Training stopped for a reason that starting again would not mend."""


class TooManyErrorRows(SegrayError):
    """A run is finished and all its rows are written, but too many of them are errors."""

    exit_code = 3


class ClusterError(SegrayError):
    """Ray cannot be reached, or a worker failed in a way that segray has no name for; carries Ray's last line."""


class StorageError(SegrayError):
    """A file system or object store refused, failed or was out of reach."""

    exit_code = 4


class MissingFileError(StorageError):
    """Nothing is stored at a URI that should hold something."""


class ChangedFileError(StorageError):
    """A file is not the one any more that was listed."""


class UnusableFileError(StorageError):
    """One file cannot be opened though its store is well: its name is too long or a folder's, or it is archived."""
