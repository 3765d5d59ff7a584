"""Encoded images and masks to arrays, and back. What cannot be decoded is an ``ImageFault`` with its kind."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from segray.classes import build_palette
from segray.config import DEFAULT_MAX_IMAGE_PX
from segray.errors import FaultKind, ImageFault, flatten_message

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
MASK_EXTENSIONS = ("png", "bmp", "gif", "tif", "tiff")  # lossless ones: JPEG blurs class values
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_MASK_FORMATS = ("PNG", "BMP", "GIF", "TIFF")
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")

# Pillow's own bomb guard is a fixed number that warns first; `_load` refuses by the caller's limit, before any pixel.
Image.MAX_IMAGE_PIXELS = None


def decode_image(content: bytes, max_px: int = DEFAULT_MAX_IMAGE_PX) -> npt.NDArray[np.uint8]:
    """Decode an image file as a viewer shows it: EXIF orientation applied, first frame, alpha dropped.

    16-bit greyscale is scaled to 8 bits. Formats: PNG, JPEG, WebP, BMP, GIF, TIFF.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ImageFault: ``unreadable``, ``truncated``, ``unsupported`` or ``too_large``.
    """
    image = _load(content, _IMAGE_FORMATS, max_px)
    if image.mode in _SIXTEEN_BIT_MODES:
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65_535)
        image = Image.fromarray((grey // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ImageFault(FaultKind.UNSUPPORTED, "floating-point pixels; convert the image to 8 or 16 bits")
    return np.asarray(image.convert("RGB"))


def decode_mask(content: bytes, max_px: int = DEFAULT_MAX_IMAGE_PX) -> npt.NDArray[np.integer]:
    """Decode a mask file to its raw values, EXIF orientation applied; palette images give palette indices.

    Returns:
        (H, W) integers, 0..65535.

    Raises:
        ImageFault: As ``decode_image``, and ``mask_mismatch`` where the file has colour channels.
    """
    image = _load(content, _MASK_FORMATS, max_px)
    if image.mode not in ("1", "L", "P", *_SIXTEEN_BIT_MODES):
        raise ImageFault(
            FaultKind.MASK_MISMATCH,
            f"expected one channel of class values, got {image.mode}; save the mask as greyscale or palette PNG",
        )
    raw = np.asarray(image)
    if image.mode == "I" and (raw.min() < 0 or raw.max() > 65_535):
        raise ImageFault(FaultKind.MASK_MISMATCH, f"expected values 0 to 65535, got {raw.min()} to {raw.max()}")
    return raw.astype(np.uint8) if image.mode == "1" else raw


def _load(content: bytes, formats: tuple[str, ...], max_px: int) -> Image.Image:
    if not content:
        raise ImageFault(FaultKind.UNREADABLE, "empty file")
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
    except UnidentifiedImageError:
        raise ImageFault(FaultKind.UNREADABLE, f"not an image in {', '.join(formats)}") from None
    except Exception as error:  # a broken header raises whatever the format's parser trips over
        raise ImageFault(FaultKind.UNREADABLE, f"broken header: {flatten_message(error)}") from error
    if image.width * image.height > max_px:
        size = f"{image.width}x{image.height}"
        raise ImageFault(
            FaultKind.TOO_LARGE, f"{size} pixels, more than the limit of {max_px}; see segment.max_image_px"
        )
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:
        truncated = "truncated" in str(error).lower() or isinstance(error, EOFError)
        kind = FaultKind.TRUNCATED if truncated else FaultKind.UNREADABLE
        raise ImageFault(kind, f"{image.format}: {flatten_message(error)}") from error


def encode_mask_png(mask: npt.NDArray[np.integer], num_classes: int) -> bytes:
    """Encode a class-index map (H, W) as PNG: with the class palette up to 256 classes, else 16-bit greyscale."""
    image = Image.fromarray(mask)
    if mask.dtype == np.uint8:
        image.putpalette(build_palette(num_classes).tobytes())
    return encode_png(image)


def encode_png(image: Image.Image) -> bytes:
    """Return a picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def resize_image(image_hwc: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Resize (H, W, 3) uint8 to ``size`` (height, width), bilinear with antialiasing."""
    height, width = size
    if image_hwc.shape[:2] == size:
        return image_hwc
    return np.asarray(Image.fromarray(image_hwc).resize((width, height), Image.Resampling.BILINEAR))


def resize_mask(mask_hw: npt.NDArray[np.integer], size: tuple[int, int]) -> npt.NDArray[np.integer]:
    """Resize a class-index map to ``size`` (height, width), nearest neighbour: no value is ever mixed."""
    if mask_hw.shape == size:
        return mask_hw
    # centre of each target pixel, as bilinear resizing of the image takes it
    rows = ((np.arange(size[0]) + 0.5) * mask_hw.shape[0] / size[0]).astype(np.int64)
    columns = ((np.arange(size[1]) + 0.5) * mask_hw.shape[1] / size[1]).astype(np.int64)
    resized: npt.NDArray[np.integer] = mask_hw[rows[:, None], columns[None, :]]
    return resized
