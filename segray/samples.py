"""One image, and its ground truth, from where they are stored to arrays. What cannot be used is an ``ImageFault``."""

import os

import numpy as np
import numpy.typing as npt

from segray.classes import ClassMap
from segray.config import DEFAULT_MAX_IMAGE_PX
from segray.errors import ChangedFileError, FaultKind, ImageFault, MissingFileError, StorageError, UnusableFileError
from segray.images import decode_image_with_note, decode_mask
from segray.storage import is_local, read_bytes


def read_image(uri: str, max_px: int = DEFAULT_MAX_IMAGE_PX, etag: str | None = None) -> npt.NDArray[np.uint8]:
    """Read an image, (H, W, 3) uint8 RGB; see ``read_image_with_note``."""
    image, _ = read_image_with_note(uri, max_px, etag)
    return image


def read_image_with_note(uri: str, max_px: int, etag: str | None = None) -> tuple[npt.NDArray[np.uint8], str | None]:
    """Read an image, (H, W, 3) uint8 RGB, and what a reader of its mask should know ("first of 12 frames").

    Args:
        uri: The image.
        max_px: Height times width that it may have.
        etag: The entity tag that it was listed with; None takes any content.

    Raises:
        ImageFault: ``missing``, ``changed``, ``unreadable``, ``truncated``, ``unsupported`` or ``too_large``.
        StorageError: The store refused or failed.
    """
    try:
        return decode_image_with_note(read_bytes(uri, etag), max_px)
    except MissingFileError as error:
        if etag is not None:  # a listing has seen it
            _require_folder(uri)
        raise ImageFault(FaultKind.MISSING, "no such file: removed since it was listed, or listed wrongly") from error
    except ChangedFileError as error:
        raise ImageFault(FaultKind.CHANGED, f"not the file any more that was listed: {error}") from error
    except UnusableFileError as error:
        raise ImageFault(FaultKind.UNSUPPORTED, str(error)) from error


def read_truth(
    uri: str,
    size: tuple[int, ...] | None,
    classes: ClassMap,
    max_px: int = DEFAULT_MAX_IMAGE_PX,
    etag: str | None = None,
) -> npt.NDArray[np.integer]:
    """Read the mask of an image of ``size`` (height, width; None if not known) as a class-index map (H, W).

    Raises:
        ImageFault: ``mask_missing``, ``changed``, or ``mask_mismatch``: of another size, with undeclared values,
            unreadable.
        StorageError: The store refused or failed.
    """
    truth = classes.encode(read_mask(uri, max_px, etag))
    if size is not None and truth.shape != size:
        raise describe_size_fault(truth.shape, size)
    return truth


def read_mask(uri: str, max_px: int = DEFAULT_MAX_IMAGE_PX, etag: str | None = None) -> npt.NDArray[np.integer]:
    """Read the raw values of a mask, (H, W) integers, 0..65535.

    Raises:
        ImageFault: ``mask_missing``, ``changed``, or ``mask_mismatch``: unreadable, or in colour.
        StorageError: The store refused or failed.
    """
    try:
        return decode_mask(read_bytes(uri, etag), max_px)
    except MissingFileError as error:
        if etag is not None:  # a listing has seen it
            _require_folder(uri)
        raise ImageFault(FaultKind.MASK_MISSING, f"no mask at {uri}", "add it, or take its image out") from error
    except ChangedFileError as error:
        raise ImageFault(FaultKind.CHANGED, f"not the mask any more that was listed: {error}") from error
    except ImageFault as error:
        raise ImageFault(FaultKind.MASK_MISMATCH, error.message, error.remedy) from error
    except UnusableFileError as error:
        raise ImageFault(FaultKind.MASK_MISMATCH, str(error)) from error


def describe_size_fault(mask_size: tuple[int, ...], size: tuple[int, ...]) -> ImageFault:
    """Return what to say of a mask that is not of its image's size; both are (height, width)."""
    return ImageFault(
        FaultKind.MASK_MISMATCH,
        f"mask of {mask_size[1]}x{mask_size[0]} pixels for an image of {size[1]}x{size[0]}",
        "save the mask at the image's size",
    )


def _require_folder(uri: str) -> None:
    """Tell a disk that is not mounted here, or not any more, from a file that was removed since it was listed."""
    if is_local(uri) and not os.path.isdir(os.path.dirname(uri)):
        raise StorageError(
            f"cannot read {uri}: this node sees no folder {os.path.dirname(uri)}; mount it on every node. If the "
            "folder was removed, make an empty one of this name: its images become error rows"
        )
