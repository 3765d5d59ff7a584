"""The temporary folder on the driver's disk in which a plan is prepared."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from segray.errors import StorageError, flatten_message


@contextmanager
def make_spool() -> Iterator[Path]:
    """Yield a temporary local folder for a plan.

    Raises:
        StorageError: The folder cannot be written, for example because the disk is full.
    """
    try:
        with TemporaryDirectory(prefix="segray-plan-") as folder:
            yield Path(folder)
    except OSError as error:
        raise StorageError(
            f"cannot write the plan to the temporary folder {gettempdir()}: {flatten_message(error)}; free disk space, "
            "or set TMPDIR to another folder"
        ) from error
