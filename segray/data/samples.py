"""Read one image, or its mask, by URI as an array. A file that cannot be used raises an ``ImageFault``."""

import os

import numpy as np
import numpy.typing as npt

from segray.config import DEFAULT_MAX_IMAGE_PX
from segray.data.classes import ClassMap
from segray.data.images import decode_image_with_note, decode_mask
from segray.errors import (
    ChangedFileError,
    FaultKind,
    ForbiddenFileError,
    ImageFault,
    MissingFileError,
    StorageError,
    UnusableFileError,
)
from segray.storage import can_read_beside, is_local, read_bytes


def read_image(uri: str, max_px: int = DEFAULT_MAX_IMAGE_PX, etag: str | None = None) -> npt.NDArray[np.uint8]:
    """Read an image as (H, W, 3) uint8 RGB; see ``read_image_with_note``."""
    image, _ = read_image_with_note(uri, max_px, etag)
    return image


def read_image_with_note(uri: str, max_px: int, etag: str | None = None) -> tuple[npt.NDArray[np.uint8], str | None]:
    """Read an image as (H, W, 3) uint8 RGB, with a note on omitted content, such as ``first of 12 frames``, or None.

    Args:
        uri: URI of the image.
        max_px: Maximum height times width, in pixels.
        etag: Entity tag that the image was listed with. None accepts any content.

    Raises:
        ImageFault: ``missing``, ``changed``, ``forbidden``, ``unreadable``, ``truncated``, ``unsupported`` or
            ``too_large``.
        StorageError: The store denied access to the whole folder, or failed.
    """
    return decode_image_with_note(fetch_image(uri, etag), max_px)


def fetch_image(uri: str, etag: str | None = None) -> bytes:
    """Read the encoded file of an image; ``etag`` is the entity tag it was listed with, None accepts any content.

    Raises:
        ImageFault: ``missing``, ``changed``, ``forbidden`` or ``unsupported``.
        StorageError: The store denied access to the whole folder, or failed.
    """
    missing = ImageFault(FaultKind.MISSING, "no such file: it was removed after it was listed, or the list is wrong")
    return _fetch(uri, etag, "file", missing, FaultKind.UNSUPPORTED)


def read_truth(
    uri: str,
    size: tuple[int, ...] | None,
    classes: ClassMap,
    max_px: int = DEFAULT_MAX_IMAGE_PX,
    etag: str | None = None,
) -> npt.NDArray[np.integer]:
    """Read the mask of an image as a class-index map (H, W).

    Args:
        uri: URI of the mask.
        size: (height, width) of the image, which the mask must have; None if it is unknown.
        classes: Classes and their raw values.
        max_px: Maximum height times width, in pixels.
        etag: Entity tag that the mask was listed with. None accepts any content.

    Raises:
        ImageFault: ``mask_missing``, ``changed``, ``forbidden``, or ``mask_mismatch`` if the mask has another size or
            undeclared values, or cannot be decoded.
        StorageError: The store denied access to the whole folder, or failed.
    """
    return decode_truth(fetch_mask(uri, etag), size, classes, max_px)


def decode_truth(
    content: bytes, size: tuple[int, ...] | None, classes: ClassMap, max_px: int = DEFAULT_MAX_IMAGE_PX
) -> npt.NDArray[np.integer]:
    """Decode the encoded file of a mask; see ``read_truth``.

    Raises:
        ImageFault: ``mask_mismatch``.
    """
    truth = classes.encode(_decode_raw(content, max_px))
    if size is not None and truth.shape != size:
        raise describe_size_fault(truth.shape, size)
    return truth


def read_mask(uri: str, max_px: int = DEFAULT_MAX_IMAGE_PX, etag: str | None = None) -> npt.NDArray[np.integer]:
    """Read the raw values of a mask as (H, W) integers, 0..65535.

    Raises:
        ImageFault: ``mask_missing``, ``changed``, ``forbidden``, or ``mask_mismatch`` if it cannot be decoded or has
            several channels.
        StorageError: The store denied access to the whole folder, or failed.
    """
    return _decode_raw(fetch_mask(uri, etag), max_px)


def fetch_mask(uri: str, etag: str | None = None) -> bytes:
    """Read the encoded file of a mask; ``etag`` is the entity tag it was listed with, None accepts any content.

    Raises:
        ImageFault: ``mask_missing``, ``changed``, ``forbidden`` or ``mask_mismatch``.
        StorageError: The store denied access to the whole folder, or failed.
    """
    missing = ImageFault(FaultKind.MASK_MISSING, f"no mask at {uri}", "add it, or remove its image from the data set")
    return _fetch(uri, etag, "mask", missing, FaultKind.MASK_MISMATCH)


def _fetch(uri: str, etag: str | None, what: str, missing: ImageFault, unusable: FaultKind) -> bytes:
    try:
        return read_bytes(uri, etag)
    except MissingFileError as error:
        if etag is not None:  # The file existed when it was listed.
            _require_folder(uri)
        raise missing from error
    except ChangedFileError as error:
        raise ImageFault(FaultKind.CHANGED, f"the {what} was replaced after it was listed: {error}") from error
    except UnusableFileError as error:
        raise ImageFault(unusable, str(error)) from error
    except ForbiddenFileError as error:
        if not can_read_beside(uri):  # The credentials are at fault, not the file.
            raise
        raise ImageFault(FaultKind.FORBIDDEN, f"the {what} cannot be read: {error}") from error


def _decode_raw(content: bytes, max_px: int) -> npt.NDArray[np.integer]:
    try:
        return decode_mask(content, max_px)
    except ImageFault as error:
        raise ImageFault(FaultKind.MASK_MISMATCH, error.message, error.remedy) from error


def describe_size_fault(mask_size: tuple[int, ...], size: tuple[int, ...]) -> ImageFault:
    """Return the fault of a mask whose size differs from that of its image; both sizes are (height, width)."""
    return ImageFault(
        FaultKind.MASK_MISMATCH,
        f"mask of {mask_size[1]}x{mask_size[0]} pixels for an image of {size[1]}x{size[0]}",
        "save the mask at the image's size",
    )


def _require_folder(uri: str) -> None:
    """Raise if the folder of a missing file does not exist either, as on a node where its disk is not mounted."""
    if is_local(uri) and not os.path.isdir(os.path.dirname(uri)):
        raise StorageError(
            f"cannot read {uri}: the folder {os.path.dirname(uri)} does not exist on this node; mount it on every "
            "node. If it was removed on purpose, create an empty folder of this name, and its images become error rows"
        )
