"""Exceptions raised by segray, and the process exit code of each.

    SegrayError                 1
    ├── ConfigError             2   a setting is wrong
    ├── DataError               1   images, masks or a manifest cannot be used
    │   └── ImageFault          1   one image or mask cannot be used; segmentation records it as an error row
    ├── BundleError             1   a model bundle is damaged or incompatible
    ├── RunMismatchError        2   the output folder holds another run
    ├── TrainingError           1   training failed
    ├── TooManyErrorRows        3   the run is complete, but too many of its images are error rows
    ├── StoppedByErrorRows      5   the run was stopped early, because most of its images are error rows
    ├── ClusterError            1   Ray cannot be reached, lacks resources, or a worker failed
    └── StorageError            4   environment error: permissions, network or disk
        ├── MissingFileError    4   there is no file at this URI
        ├── ChangedFileError    4   the file has changed since it was listed
        ├── ForbiddenFileError  4   reading this file was denied
        └── UnusableFileError   4   this one file cannot be opened

Each message is one line that says what was received, what was expected, and what to do, and names the URI or setting.
"""

from enum import StrEnum


def flatten_message(error: BaseException) -> str:
    """Return the message of any exception as one line, or the name of its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


class SegrayError(Exception):
    """Base class of every exception that segray raises on purpose.

    Catch it to handle all of them. ``str(error)`` is one line that a user can act on.

    Attributes:
        exit_code: Exit code of the ``segray`` command and of the job files when this exception ends them: 1 for input
            that cannot be used, 2 for a wrong setting or the output of another run, 3 for too many error rows, 4 for an
            environment error, 5 for a run that was stopped because of its error rows. 0 is success.
    """

    exit_code = 1

    def __str__(self) -> str:
        return super().__str__().partition("\n")[0]  # Ray Data appends lines to a worker's error.


class ConfigError(SegrayError):
    """Raised if a setting is unknown, missing, has the wrong type or range, or contradicts another setting.

    The message names the setting and the accepted values. Exit code 2.
    """

    exit_code = 2


class DataError(SegrayError):
    """Raised if labelled images, masks, an image list or a manifest cannot be used as configured.

    The message names the first files concerned and the remedy; ``segray check`` lists all of them. Exit code 1.
    """


class FaultKind(StrEnum):
    """Reason why a planned image is an error row: the value of the column ``error_kind``. There are no others.

    After the images are fixed, a rerun with ``segment.retry_errors: true`` processes their fragments again.

    Attributes:
        description: What the kind means, in one sentence.
        remedy: What to do about it, in one sentence.
    """

    description: str
    remedy: str

    def __new__(cls, value: str, description: str = "", remedy: str = "") -> "FaultKind":
        """Create a member that compares equal to ``value``."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.description = description
        member.remedy = remedy
        return member

    UNREADABLE = (
        "unreadable",
        "The file is empty, is not an image, or its content is damaged.",
        "Replace the file, or remove it from the input.",
    )
    TRUNCATED = (
        "truncated",
        "The file is incomplete: its end is missing.",
        "Copy the complete file again.",
    )
    UNSUPPORTED = (
        "unsupported",
        "The file is valid, but its format, pixel type or compression is not supported, or it cannot be opened because "
        "of its name or because it is archived.",
        "Convert the image to 8-bit RGB in one of the supported formats; rename or restore a file that cannot be "
        "opened.",
    )
    TOO_LARGE = (
        "too_large",
        "The image has more pixels than segment.max_image_px allows, or its metadata expands to a suspicious size.",
        "Rerun with a higher segment.max_image_px and segment.retry_errors: true if the nodes have enough memory, or "
        "split the image; save it without its metadata.",
    )
    MISSING = (
        "missing",
        "There is no file at this URI: it was removed after it was listed, or the list names a wrong URI.",
        "Restore the file and rerun with segment.retry_errors: true, or correct the list or manifest.",
    )
    CHANGED = (
        "changed",
        "The file was replaced after it was listed, so its content differs from the planned one.",
        "Rerun with segment.retry_errors: true to use the new file.",
    )
    MASK_MISSING = (
        "mask_missing",
        "Ground truth was given, but this image has no mask.",
        "Add the mask under the name of the image, or remove the image from the input.",
    )
    MASK_MISMATCH = (
        "mask_mismatch",
        "The mask cannot be used with its image: it has another size, undeclared class values or several colour "
        "channels, or it cannot be decoded.",
        "Correct the mask, or declare its values in data.class_values or data.ignore_values before training.",
    )
    FORBIDDEN = (
        "forbidden",
        "The store denies access to this file, although other files of the same folder can be read.",
        "Grant the nodes access to the file (its access control list, its encryption key), or remove it from the "
        "input.",
    )
    TIMEOUT = (
        "timeout",
        "Decoding or predicting this image took longer than segment.image_timeout_s, several times.",
        "Save the image again (for a JPEG: without progressive scans), or rerun with a higher segment.image_timeout_s "
        "and segment.retry_errors: true.",
    )
    FAILED = (
        "failed",
        "Processing this image ran out of memory, or ended the worker process repeatedly.",
        "Give the nodes more memory and rerun with segment.retry_errors: true, or start a new output with a lower "
        "segment.max_image_px.",
    )


class ImageFault(DataError):
    """Raised if one image, or its mask, cannot be used while others can.

    Functions that read a single image raise it. Segmentation records it as an error row, and the label check as a line
    of its report, so it does not end a run. Exit code 1.

    Args:
        kind: Reason, as in the column ``error_kind``.
        message: What was received, and what was expected.
        remedy: What to do. Empty if the message already says it, or if the file can only be replaced.
    """

    def __init__(self, kind: FaultKind, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.kind = kind
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[type["ImageFault"], tuple[FaultKind, str, str]]:
        # Exceptions whose constructor takes several arguments cannot be unpickled by default.
        return type(self), (self.kind, self.message, self.remedy)


class BundleError(SegrayError):
    """Raised if a model bundle is missing, damaged, of an incompatible format version, or cannot be exported.

    Copy the bundle again, or train again. Exit code 1.
    """


class RunMismatchError(SegrayError):
    """Raised if the output folder belongs to a run with another model, other settings or other images.

    The message lists the differences. Nothing has been written. Choose another output, or restore the settings and
    images of the first run. Exit code 2.
    """

    exit_code = 2


class TrainingError(SegrayError):
    """Raised if training fails: the loss is not finite, workers are lost too often or stall, or no checkpoint is left.

    Exit code 1.
    """


class TooManyErrorRows(SegrayError):
    """Raised if a segmentation run is complete, but its share of error rows reaches ``segment.max_error_fraction``.

    All rows are written. Fix the images and rerun with ``segment.retry_errors: true``, or raise the limit. Exit code 3.
    """

    exit_code = 3


class StoppedByErrorRows(SegrayError):
    """Raised if a segmentation run is stopped early: its share of error rows exceeds ``segment.stop_error_fraction``.

    The rows written so far are kept. If the images or the model are wrong, start again with another output; otherwise
    rerun with ``segment.stop_error_fraction: 1`` to resume. Exit code 5.
    """

    exit_code = 5


class ClusterError(SegrayError):
    """Raised if Ray cannot be reached, the cluster can never provide the requested resources, or a worker failed.

    It is also raised if the cause of a worker's failure is unknown; the message then holds the last line of Ray's
    error. Exit code 1.
    """


class StorageError(SegrayError):
    """Raised on an environment error: missing permissions, an unreachable network, or a full disk.

    It is raised after the retries of the file system or object store. Nothing that was already written is lost: fix
    the cause and rerun the same command to resume. Exit code 4.
    """

    exit_code = 4


class MissingFileError(StorageError):
    """Raised if there is no file or folder at a URI. Exit code 4."""


class ChangedFileError(StorageError):
    """Raised if the entity tag of a file is not the one that it was listed with. Exit code 4."""


class ForbiddenFileError(StorageError):
    """Raised if the store denies reading a file: because of the file itself, or of the credentials. Exit code 4."""


class UnusableFileError(StorageError):
    """Raised if one file cannot be opened although its store works: its name is invalid, or it is archived.

    Rename or restore the file. Exit code 4.
    """
