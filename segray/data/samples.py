"""One image, and its ground truth, from where they are stored to arrays. What cannot be used is an ``ImageFault``."""

import os

import numpy as np
import numpy.typing as npt

from segray.config import DEFAULT_MAX_IMAGE_PX
from segray.data.classes import ClassMap
from segray.data.images import decode_image_with_note, decode_mask
from segray.errors import ChangedFileError, FaultKind, ImageFault, MissingFileError, StorageError, UnusableFileError
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
    return decode_image_with_note(fetch_image(uri, etag), max_px)


def fetch_image(uri: str, etag: str | None = None) -> bytes:
    """Read the file of an image; ``etag`` is the entity tag that it was listed with, None takes any content.

    Raises:
        ImageFault: ``missing``, ``changed`` or ``unsupported``.
        StorageError: The store refused or failed.
    """
    try:
        return read_bytes(uri, etag)
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
    return decode_truth(fetch_mask(uri, etag), size, classes, max_px)


def decode_truth(
    content: bytes, size: tuple[int, ...] | None, classes: ClassMap, max_px: int = DEFAULT_MAX_IMAGE_PX
) -> npt.NDArray[np.integer]:
    """Decode the file of a mask as ``read_truth`` does.

    Raises:
        ImageFault: ``mask_mismatch``.
    """
    truth = classes.encode(_decode_raw(content, max_px))
    if size is not None and truth.shape != size:
        raise describe_size_fault(truth.shape, size)
    return truth


def read_mask(uri: str, max_px: int = DEFAULT_MAX_IMAGE_PX, etag: str | None = None) -> npt.NDArray[np.integer]:
    """Read the raw values of a mask, (H, W) integers, 0..65535.

    Raises:
        ImageFault: ``mask_missing``, ``changed``, or ``mask_mismatch``: unreadable, or in colour.
        StorageError: The store refused or failed.
    """
    return _decode_raw(fetch_mask(uri, etag), max_px)


def fetch_mask(uri: str, etag: str | None = None) -> bytes:
    """Read the file of a mask.

    Raises:
        ImageFault: ``mask_missing``, ``changed`` or ``mask_mismatch``.
        StorageError: The store refused or failed.
    """
    try:
        return read_bytes(uri, etag)
    except MissingFileError as error:
        if etag is not None:  # a listing has seen it
            _require_folder(uri)
        raise ImageFault(FaultKind.MASK_MISSING, f"no mask at {uri}", "add it, or take its image out") from error
    except ChangedFileError as error:
        raise ImageFault(FaultKind.CHANGED, f"not the mask any more that was listed: {error}") from error
    except UnusableFileError as error:
        raise ImageFault(FaultKind.MASK_MISMATCH, str(error)) from error


def _decode_raw(content: bytes, max_px: int) -> npt.NDArray[np.integer]:
    try:
        return decode_mask(content, max_px)
    except ImageFault as error:
        raise ImageFault(FaultKind.MASK_MISMATCH, error.message, error.remedy) from error


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
