"""Decode, encode and resize images and masks. A file that cannot be decoded raises an ``ImageFault``."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from segray.config import DEFAULT_MAX_IMAGE_PX
from segray.data.classes import build_palette
from segray.data.image_files import get_scale, open_image
from segray.data.image_limits import count_tiff_pages
from segray.errors import FaultKind, ImageFault

_IMAGE_FORMATS = ("PNG", "JPEG", "WebP", "BMP", "GIF", "TIFF")
_MASK_FORMATS = ("PNG", "BMP", "GIF", "TIFF")
_JPEG_START = b"\xff\xd8\xff"
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
_MAX_COUNTED_PAGES = 1000  # Of a TIFF.
_MAX_COUNTED_GIF_BYTES = 8_000_000  # Pillow counts the frames of 4 MB per second.


def decode_image(content: bytes, max_px: int = DEFAULT_MAX_IMAGE_PX) -> npt.NDArray[np.uint8]:
    """Decode an image file as a viewer shows it: the first frame, with EXIF orientation applied, without alpha.

    PNG, JPEG, WebP, BMP, GIF and TIFF are read, whatever the name of the file. 16-bit colour keeps the upper 8 bits of
    each channel; 16-bit greyscale is scaled to 8 bits. CMYK and Lab are converted to RGB. Colour profiles are ignored.

    Args:
        content: The whole file.
        max_px: Maximum height times width, in pixels.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ImageFault: ``unreadable``, ``truncated``, ``unsupported`` or ``too_large``.
        MemoryError: The image is within the limit, but the machine lacks the memory to decode it.
    """
    return decode_image_with_note(content, max_px)[0]


def decode_image_with_note(
    content: bytes, max_px: int = DEFAULT_MAX_IMAGE_PX
) -> tuple[npt.NDArray[np.uint8], str | None]:
    """Decode as ``decode_image``, with a note on omitted content, such as ``first of 12 frames``, or None."""
    with open_image(content, _IMAGE_FORMATS, max_px) as image:
        return _to_rgb(image), _describe_frames(image, content)


def decode_image_reduced(
    content: bytes, max_px: int, size: tuple[int, int]
) -> tuple[npt.NDArray[np.uint8], tuple[int, int], str | None]:
    """Decode as ``decode_image_with_note``, but decode a JPEG that is much larger than ``size`` at a reduced size.

    The sides are divided by 8, 4 or 2: by the largest of these that divides both exactly and leaves neither shorter
    than twice the longer side of ``size`` (height, width). After resizing to ``size``, the result differs from that of
    the full image by less than one grey level on average.

    Returns:
        The pixels, (height, width) of the full image, and the note.
    """
    with open_image(content, _IMAGE_FORMATS, max_px, at_least_px=2 * max(size)) as image:
        scale, pixels = get_scale(image), _to_rgb(image)
        return pixels, (scale * pixels.shape[0], scale * pixels.shape[1]), _describe_frames(image, content)


def decode_mask(content: bytes, max_px: int = DEFAULT_MAX_IMAGE_PX) -> npt.NDArray[np.integer]:
    """Decode a mask file to its raw values, with EXIF orientation applied; palette images give palette indices.

    PNG, BMP, GIF and TIFF are read, whatever the name of the file.

    Returns:
        (H, W) integers, 0..65535.

    Raises:
        ImageFault: As ``decode_image``, and ``mask_mismatch`` if the file has several channels.
    """
    if content.startswith(_JPEG_START):  # Converting the file to PNG would not restore the values.
        raise ImageFault(
            FaultKind.UNSUPPORTED,
            "JPEG file, whose compression changes class values",
            "create the mask again from its source, as PNG",
        )
    with open_image(content, _MASK_FORMATS, max_px) as image:
        if image.mode not in ("1", "L", "P", "I", *_SIXTEEN_BIT_MODES):
            raise ImageFault(
                FaultKind.MASK_MISMATCH,
                f"expected one channel of class values, got {image.mode}",
                _get_colour_remedy(image),
            )
        raw = np.asarray(image)
        if image.mode == "I" and (raw.min() < 0 or raw.max() > 65_535):
            raise ImageFault(FaultKind.MASK_MISMATCH, f"expected values 0 to 65535, got {raw.min()} to {raw.max()}")
        return raw.astype(np.uint8) if image.mode == "1" else raw


def _get_colour_remedy(image: Image.Image) -> str:
    """Return a sentence that says how to convert a mask with several channels."""
    if image.mode == "F":
        return "save the mask as 8-bit or 16-bit greyscale PNG"
    channels = [np.asarray(image.getchannel(band)) for band in image.getbands() if band not in ("A", "a", "X")]
    if all(np.array_equal(channel, channels[0]) for channel in channels):
        return "its channels are equal: save only the first one, as greyscale PNG"
    return "replace each colour by its class value, and save the mask as greyscale or palette PNG"


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.mode in ("I", "F"):
        pixels = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise ImageFault(FaultKind.UNSUPPORTED, f"{pixels} pixels; convert the image to 8 or 16 bits")
    if image.mode in _SIXTEEN_BIT_MODES:
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode == "La":  # Greyscale with premultiplied alpha, which Pillow converts only to LA.
        image = image.convert("LA")
    return np.asarray(image.convert("RGB"))


def _describe_frames(image: ImageFile, content: bytes) -> str | None:
    is_tiff = isinstance(image, TiffImageFile)
    try:
        if isinstance(image, GifImageFile) and len(content) > _MAX_COUNTED_GIF_BYTES:
            return "first of several frames" if image.is_animated else None
        num_frames = count_tiff_pages(content, _MAX_COUNTED_PAGES) if is_tiff else getattr(image, "n_frames", 1)
    except MemoryError:
        raise
    except Exception:  # A later frame is broken or missing; only the first one is used.
        return "first of several frames"
    if is_tiff and num_frames > _MAX_COUNTED_PAGES:
        return f"first of more than {_MAX_COUNTED_PAGES} frames"
    return f"first of {num_frames} frames" if num_frames > 1 else None


def encode_mask_png(mask: npt.NDArray[np.integer], num_classes: int) -> bytes:
    """Encode a class-index map (H, W) as PNG: with the class palette if it is uint8, else as 16-bit greyscale."""
    image = Image.fromarray(mask)
    if mask.dtype == np.uint8:
        image.putpalette(build_palette(num_classes).tobytes())
    return encode_png(image)


def encode_png(image: Image.Image) -> bytes:
    """Return the content of a PNG file with an image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def resize_image(image_hwc: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Resize an image, (H, W, 3) uint8, to ``size`` (height, width), bilinear with antialiasing."""
    height, width = size
    if image_hwc.shape[:2] == size:
        return image_hwc
    return np.asarray(Image.fromarray(image_hwc).resize((width, height), Image.Resampling.BILINEAR))


def resize_mask(mask_hw: npt.NDArray[np.integer], size: tuple[int, int]) -> npt.NDArray[np.integer]:
    """Resize a class-index map (H, W) to ``size`` (height, width) by nearest neighbour, so values are not mixed."""
    if mask_hw.shape == size:
        return mask_hw
    # Sample at the centre of each target pixel, as the bilinear resizing of the image does.
    rows = ((np.arange(size[0]) + 0.5) * mask_hw.shape[0] / size[0]).astype(np.int64)
    columns = ((np.arange(size[1]) + 0.5) * mask_hw.shape[1] / size[1]).astype(np.int64)
    resized: npt.NDArray[np.integer] = mask_hw[rows][:, columns]  # Eight times as fast as both at once.
    return resized
