"""Encoded images and masks to arrays, and back. What cannot be decoded is an ``ImageFault`` with its kind."""

import contextlib
import ctypes
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, _imaging
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from segray.classes import build_palette
from segray.config import DEFAULT_MAX_IMAGE_PX
from segray.errors import FaultKind, ImageFault, flatten_message

_IMAGE_FORMATS = ("PNG", "JPEG", "WebP", "BMP", "GIF", "TIFF")
_MASK_FORMATS = ("PNG", "BMP", "GIF", "TIFF")
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
_TIFF_PIECES = ((273, 279), (324, 325))  # tags of offsets and lengths: of strips, of tiles
_MAX_COUNTED_PAGES = 1000  # of a TIFF; a crafted one can have so many that counting takes minutes

# Pillow's own bomb guard is a fixed number that warns first; `_load` refuses by the caller's limit, before any pixel.
Image.MAX_IMAGE_PIXELS = None

# What Pillow says beside its exceptions says nothing that an error row does not, but would fill the logs of a run over
# many broken files. Done once for the process: warnings.catch_warnings is not safe in the threads that decode here.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError, OSError):  # a Pillow with libtiff linked in statically keeps on printing
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


class _FirstFrameGif(GifImageFile):
    """A GIF whose first frame alone is wanted, so what shall become of a frame once it was shown is ignored.

    Pillow prepares that when it opens the file: by filling an area as large as the frame says it is, up to 4 GB,
    before ``_load`` can look at the size.
    """

    @property
    def disposal_method(self) -> int:
        return 0

    @disposal_method.setter
    def disposal_method(self, value: int) -> None:
        pass


# How files begin, and what reads them; None: known, so that the error can name it. The readers are called directly,
# not by Image.open, because that one takes the first error of a reader for "cannot identify image file", and gives a
# JPEG with several pictures (MPO) to a reader that fails where only the index of the other pictures is broken.
_KNOWN: tuple[tuple[str, re.Pattern[bytes], Callable[[io.BytesIO], ImageFile] | None], ...] = tuple(
    (name, re.compile(start, re.DOTALL), reader)
    for name, start, reader in (
        ("PNG", rb"\x89PNG\r\n\x1a\n", PngImageFile),
        ("JPEG", rb"\xff\xd8\xff", JpegImageFile),
        ("WebP", rb"RIFF....WEBP", WebPImageFile),
        ("BMP", rb"BM", BmpImageFile),
        ("GIF", rb"GIF8[79]a", _FirstFrameGif),
        ("TIFF", rb"(II|MM)(\*\0|\0\*)|II\+\0", TiffImageFile),
        ("big-endian BigTIFF", rb"MM\0\+", None),
        ("HEIC", rb"....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", None),
        ("AVIF", rb"....ftypavi[fs]", None),
        ("PDF", rb"%PDF-", None),
        ("PostScript", rb"%!PS|\xc5\xd0\xd3\xc6", None),
        ("PSD", rb"8BPS", None),
        ("SVG", rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--[^>]*>\s*)*<(!DOCTYPE )?svg", None),
        ("JPEG 2000", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", None),
        ("JPEG XL", rb"\0\0\0\x0cJXL |\xff\x0a", None),
        ("OpenEXR", rb"\x76\x2f\x31\x01", None),
        ("DDS", rb"DDS ", None),
        ("ICO", rb"\0\0\x01\0", None),
    )
)

_CUT = "the file is cut off"

# What Pillow's errors say, and what they mean to somebody who looks at the file. The first one that matches counts.
_MEANINGS = (
    (
        r"too large for Png|Too much memory",
        FaultKind.TOO_LARGE,
        "its text or colour profile unpacks to a size that bombs have; save the image without it",
    ),
    (
        r"cannot handle|unknown pixel mode|samples per pixel|not yet supported|BMP (compression|pixel depth|bitfields)",
        FaultKind.UNSUPPORTED,
        "channels, bits or compression that are not read; convert the image to 8-bit RGB",
    ),
    (r"(?i)truncated", FaultKind.TRUNCATED, _CUT),
    (r"not identified by this driver", FaultKind.UNREADABLE, "no pixels, or of a kind that the format does not have"),
    (r"decoder error", FaultKind.UNREADABLE, "damaged, or compressed in a way that Pillow was built without"),
)


def decode_image(content: bytes, max_px: int = DEFAULT_MAX_IMAGE_PX) -> npt.NDArray[np.uint8]:
    """Decode an image file as a viewer shows it: EXIF orientation applied, first frame, alpha dropped.

    Formats: PNG, JPEG, WebP, BMP, GIF, TIFF, whatever the file is called. Of 16 bits per channel the upper 8 are kept
    for colour, and greyscale is scaled. CMYK and Lab are converted; colour profiles are not looked at.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ImageFault: ``unreadable``, ``truncated``, ``unsupported`` or ``too_large``.
        MemoryError: The image is within the limit, but the machine is not up to it.
    """
    return decode_image_with_note(content, max_px)[0]


def decode_image_with_note(
    content: bytes, max_px: int = DEFAULT_MAX_IMAGE_PX
) -> tuple[npt.NDArray[np.uint8], str | None]:
    """Decode as ``decode_image``, and say what of the file is not in the array: ``first of 12 frames``, or None."""
    with _faults_of(content, _IMAGE_FORMATS) as reader:
        image = _load(content, reader, max_px)
        return _to_rgb(image), _describe_frames(image)


def decode_mask(content: bytes, max_px: int = DEFAULT_MAX_IMAGE_PX) -> npt.NDArray[np.integer]:
    """Decode a mask file to its raw values, EXIF orientation applied; palette images give palette indices.

    Returns:
        (H, W) integers, 0..65535.

    Raises:
        ImageFault: As ``decode_image``, and ``mask_mismatch`` where the file has colour channels.
    """
    with _faults_of(content, _MASK_FORMATS) as reader:
        image = _load(content, reader, max_px)
        if image.mode not in ("1", "L", "P", "I", *_SIXTEEN_BIT_MODES):
            raise ImageFault(
                FaultKind.MASK_MISMATCH,
                f"expected one channel of class values, got {image.mode}; save the mask as greyscale or palette PNG",
            )
        raw = np.asarray(image)
        if image.mode == "I" and (raw.min() < 0 or raw.max() > 65_535):
            raise ImageFault(FaultKind.MASK_MISMATCH, f"expected values 0 to 65535, got {raw.min()} to {raw.max()}")
        return raw.astype(np.uint8) if image.mode == "1" else raw


@contextlib.contextmanager
def _faults_of(content: bytes, formats: tuple[str, ...]) -> Iterator[Callable[[io.BytesIO], ImageFile]]:
    """Give the reader of an image file; make every error inside an ``ImageFault``, but lack of memory."""
    listed = ", ".join(formats)
    if not content:
        raise ImageFault(FaultKind.UNREADABLE, "empty file")
    name, reader = next(((name, reader) for name, start, reader in _KNOWN if start.match(content)), ("", None))
    if not name:
        raise ImageFault(FaultKind.UNREADABLE, f"not an image in {listed}")
    if reader is None or name not in formats:
        raise ImageFault(FaultKind.UNSUPPORTED, f"{name} file; convert it to one of {listed}")
    try:
        yield reader
    except (ImageFault, MemoryError):
        raise
    except Exception as error:  # a broken file raises whatever the format's parser trips over
        kind, meaning = _explain(name, content, error)
        told = "" if kind == FaultKind.TRUNCATED else f" ({flatten_message(error)})"  # the end of a file says nothing
        raise ImageFault(kind, f"{name}: {meaning}{told}") from error


def _explain(name: str, content: bytes, error: Exception) -> tuple[FaultKind, str]:
    compression = error.__cause__.args[0] if isinstance(error.__cause__, KeyError) else None
    told = ((kind, meaning) for pattern, kind, meaning in _MEANINGS if re.search(pattern, str(error)))
    kind, meaning = next(told, (FaultKind.UNREADABLE, "damaged"))
    if _is_cut(name, content):  # half a directory looks like an unsupported one
        return FaultKind.TRUNCATED, _CUT
    if name == "TIFF" and isinstance(compression, int) and compression != ExifTags.Base.ColorMap:
        return FaultKind.UNSUPPORTED, "a compression that is not read; save the image with LZW or Deflate"
    return kind, meaning


def _is_cut(name: str, content: bytes) -> bool:
    """Return whether a file that cannot be decoded lacks its end, which Pillow's errors seldom tell from damage."""
    match name:
        case "PNG":
            return b"IEND" not in content
        case "JPEG":  # no end of image behind the last start of a scan
            return content.rfind(b"\xff\xd9") <= content.rfind(b"\xff\xda")
        case "GIF":
            return not content.rstrip(b"\0").endswith(b"\0;")
        case "BMP":
            return len(content) < max(18, int.from_bytes(content[2:6], "little"))
        case "WebP":
            return len(content) < 8 + int.from_bytes(content[4:8], "little")
    try:
        directory = ImageFileDirectory_v2(content[: 16 if content[2:3] == b"+" else 8])
        file, first_at = io.BytesIO(content), directory.next
        file.seek(first_at)
        directory.load(file)
        pieces = (zip(directory.get(at, ()), directory.get(size, ()), strict=False) for at, size in _TIFF_PIECES)
        end = max((at + size for piece in pieces for at, size in piece), default=0)
    except Exception as broken:
        return isinstance(broken, struct.error)
    # `next` still is this directory where it could not be read to its end, at which the place of the next one stands
    return directory.next == first_at or end > len(content)


def _load(content: bytes, reader: Callable[[io.BytesIO], ImageFile], max_px: int) -> ImageFile:
    image = reader(io.BytesIO(content))
    if image.width * image.height > max_px:
        size = f"{image.width}x{image.height}"
        raise ImageFault(
            FaultKind.TOO_LARGE, f"{size} pixels, more than the limit of {max_px}; see segment.max_image_px"
        )
    image.load()
    if isinstance(image, PngImageFile):
        _check_png(content, image)
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # EXIF that cannot be read, or written again once the image is turned: viewers do not mind either
        pass
    return image


def _check_png(content: bytes, image: PngImageFile) -> None:
    """Refuse pixels that Pillow gives out silently: of a wrong checksum, or black where the data end too early."""
    inflate, num_bytes, at = zlib.decompressobj(), 0, 8
    *_, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    last_row = image.crop((0, image.height - 1, image.width, image.height)).tobytes()
    is_suspect = not interlaced and not any(last_row)  # decoded a second time only then
    while at + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        data = memoryview(content)[at + 4 : at + 8 + length]
        at += 12 + length
        if name != b"IDAT" or at > len(content):
            continue
        if zlib.crc32(data).to_bytes(4, "big") != content[at - 4 : at]:
            raise ImageFault(FaultKind.UNREADABLE, "PNG: damaged (wrong checksum of the pixel data)")
        rest: bytes | memoryview = data[4:]
        while is_suspect and rest:
            num_bytes += len(inflate.decompress(rest, 1 << 20))  # in pieces: it may be a bomb
            rest = inflate.unconsumed_tail
    row_bits = image.width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    if is_suspect and num_bytes < image.height * (1 + (row_bits + 7) // 8):
        raise ImageFault(FaultKind.TRUNCATED, f"PNG: {_CUT} (too few rows)")


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.mode in ("I", "F"):
        pixels = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise ImageFault(FaultKind.UNSUPPORTED, f"{pixels} pixels; convert the image to 8 or 16 bits")
    if image.mode in _SIXTEEN_BIT_MODES:
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode == "La":  # greyscale times its alpha, which Pillow only converts to its own kind
        image = image.convert("LA")
    return np.asarray(image.convert("RGB"))


def _describe_frames(image: ImageFile) -> str | None:
    try:
        num_frames = _count_pages(image) if isinstance(image, TiffImageFile) else getattr(image, "n_frames", 1)
    except MemoryError:
        raise
    except Exception:  # a later frame is broken, or not there: the first one is what was asked for
        return "first of several frames"
    if num_frames > _MAX_COUNTED_PAGES and isinstance(image, TiffImageFile):
        return f"first of more than {_MAX_COUNTED_PAGES} frames"
    return f"first of {num_frames} frames" if num_frames > 1 else None


def _count_pages(image: TiffImageFile) -> int:
    """Return the number of pages of a TIFF, up to a limit; Pillow's own count has none, and is quadratic."""
    for page in range(1, _MAX_COUNTED_PAGES + 1):
        try:
            image.seek(page)
        except EOFError:
            return page
    return _MAX_COUNTED_PAGES + 1


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
