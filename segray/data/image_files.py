"""Open encoded image files safely: the format is detected from the first bytes, and each error is an ``ImageFault``."""

import contextlib
import ctypes
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator

from PIL import ExifTags, Image, ImageOps, _imaging
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from segray.data.image_limits import FirstFrameGif, check_px, check_webp_canvas
from segray.errors import FaultKind, ImageFault, flatten_message

_SWAPPING_ORIENTATIONS = (5, 6, 7, 8)
_TIFF_PIECES = ((273, 279), (324, 325))  # Tags of the offsets and lengths of strips, and of tiles.

# Pillow's limit against decompression bombs is one for all threads. `_load` applies the caller's.
Image.MAX_IMAGE_PIXELS = None

# The warnings and log lines of Pillow repeat what the error row says, and would fill the logs of a run over many broken
# files. They are disabled once per process, because warnings.catch_warnings is not safe in the threads that decode.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError, OSError):  # A Pillow that links libtiff statically still prints.
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


# Name, first bytes and reader of each format; without a reader, the format is only named in the error message. The
# readers are not called through Image.open, which turns the first error of a reader into "cannot identify image file",
# and opens a JPEG with several pictures (MPO) with a reader that fails if the index of the other pictures is broken.
_KNOWN: tuple[tuple[str, re.Pattern[bytes], Callable[[io.BytesIO], ImageFile] | None], ...] = tuple(
    (name, re.compile(start, re.DOTALL), reader)
    for name, start, reader in (
        ("PNG", rb"\x89PNG\r\n\x1a\n", PngImageFile),
        ("JPEG", rb"\xff\xd8\xff", JpegImageFile),
        ("WebP", rb"RIFF....WEBP", WebPImageFile),
        ("BMP", rb"BM", BmpImageFile),
        ("GIF", rb"GIF8[79]a", FirstFrameGif),
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

_TRUNCATED = "the file is truncated"

# Patterns of Pillow's error messages, with the kind and the explanation that the user gets. The first match is used.
_MEANINGS = (
    (
        r"too large for Png|Too much memory",
        FaultKind.TOO_LARGE,
        "its text or colour profile expands to a suspicious size; save the image without it",
    ),
    (
        r"cannot handle|unknown pixel mode|samples per pixel|not yet supported|BMP (compression|pixel depth|bitfields)",
        FaultKind.UNSUPPORTED,
        "its channels, bit depth or compression are not supported; convert the image to 8-bit RGB",
    ),
    (r"(?i)truncated", FaultKind.TRUNCATED, _TRUNCATED),
    (r"not identified by this driver", FaultKind.UNREADABLE, "it has no pixels, or its pixel format is not valid"),
    (r"decoder error", FaultKind.UNREADABLE, "damaged, or its compression is not supported by this build of Pillow"),
)


@contextlib.contextmanager
def open_image(
    content: bytes, formats: tuple[str, ...], max_px: int, at_least_px: int | None = None
) -> Iterator[ImageFile]:
    """Open the first frame of an image file, with its pixels loaded and its EXIF orientation applied.

    Use the image inside the ``with`` block: errors that only occur on use, such as a conversion that Pillow does not
    support, are then reported as faults of the file too.

    Args:
        content: The whole file.
        formats: Names of the formats to accept: ``PNG``, ``JPEG``, ``WebP``, ``BMP``, ``GIF``, ``TIFF``.
        max_px: Maximum height times width to decode.
        at_least_px: Decode a JPEG at 1/8, 1/4 or 1/2 of its size, if that divides both sides exactly and leaves them at
            least this many pixels. None decodes it at its full size.

    Raises:
        ImageFault: ``unreadable``, ``truncated``, ``unsupported`` or ``too_large``. Any exception inside the block is
            converted too; an ``ImageFault`` raised there is left unchanged.
        MemoryError: The image is within the limit, but the machine lacks the memory to decode it.
    """
    listed = ", ".join(formats)
    if not content:
        raise ImageFault(FaultKind.UNREADABLE, "empty file")
    name, reader = next(((name, reader) for name, start, reader in _KNOWN if start.match(content)), ("", None))
    if not name:
        raise ImageFault(FaultKind.UNREADABLE, f"not an image file; expected one of {listed}")
    if reader is None or name not in formats:
        raise ImageFault(FaultKind.UNSUPPORTED, f"{name} file; convert it to one of {listed}")
    try:
        yield _load(content, reader, max_px, at_least_px)
    except (ImageFault, MemoryError):
        raise
    except Exception as error:  # The parser of a format can raise anything on a broken file.
        kind, meaning = _explain(name, content, error)
        detail = "" if kind == FaultKind.TRUNCATED else f" ({flatten_message(error)})"
        raise ImageFault(kind, f"{name}: {meaning}{detail}") from error


def swaps_sides(content: bytes) -> bool:
    """Return whether the EXIF orientation of an image file swaps its height and width.

    Args:
        content: A whole file that ``open_image`` can open.
    """
    reader = next(reader for _, start, reader in _KNOWN if reader and start.match(content))
    try:
        return reader(io.BytesIO(content)).getexif().get(ExifTags.Base.Orientation, 1) in _SWAPPING_ORIENTATIONS
    except MemoryError:
        raise
    except Exception:  # EXIF data that cannot be read is ignored.
        return False


def _explain(name: str, content: bytes, error: Exception) -> tuple[FaultKind, str]:
    compression = error.__cause__.args[0] if isinstance(error.__cause__, KeyError) else None
    matches = ((kind, meaning) for pattern, kind, meaning in _MEANINGS if re.search(pattern, str(error)))
    kind, meaning = next(matches, (FaultKind.UNREADABLE, "damaged"))
    if _is_truncated(name, content):  # Checked first: an incomplete TIFF directory looks like an unsupported one.
        return FaultKind.TRUNCATED, _TRUNCATED
    if name == "TIFF" and isinstance(compression, int) and compression != ExifTags.Base.ColorMap:
        return FaultKind.UNSUPPORTED, "its compression is not supported; save the image with LZW or Deflate"
    return kind, meaning


def _is_truncated(name: str, content: bytes) -> bool:
    """Return whether a file that cannot be decoded is incomplete, which Pillow's errors rarely tell from damage."""
    match name:
        case "PNG":
            return b"IEND" not in content
        case "JPEG":  # There is no end-of-image marker after the last start-of-scan marker.
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
    # The offset of the next directory follows this one. If `next` is still the offset of this one, its end is missing.
    return directory.next == first_at or end > len(content)


def _load(content: bytes, reader: Callable[[io.BytesIO], ImageFile], max_px: int, at_least_px: int | None) -> ImageFile:
    if reader is WebPImageFile:
        check_webp_canvas(content, max_px)
    image = reader(io.BytesIO(content))
    check_px(image, max_px)
    if at_least_px is not None:
        _reduce(image, at_least_px)
    image.load()
    if isinstance(image, PngImageFile):
        _check_png(content, image)
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # EXIF data that cannot be read, or rewritten after the rotation, is ignored, as viewers do.
        pass
    return image


def _reduce(image: ImageFile, at_least_px: int) -> None:
    """Set a JPEG to be decoded at a fraction of its size; ``draft`` has no effect on other formats."""
    for scale in (8, 4, 2):
        # If a side is not divisible, the partial last pixel shifts all others.
        divides = not (image.width % scale or image.height % scale)
        if divides and min(image.size) // scale >= at_least_px:
            image.draft(None, (image.width // scale, image.height // scale))
            return


def get_scale(image: ImageFile) -> int:
    """Return the factor, 1, 2, 4 or 8, by which ``open_image`` reduced the sides of an image."""
    return image.decoderconfig[0] if isinstance(image, JpegImageFile) and image.decoderconfig else 1


def _check_png(content: bytes, image: PngImageFile) -> None:
    """Raise on errors that Pillow ignores: a wrong checksum, or data that end early and leave black rows."""
    inflate, num_bytes, at = zlib.decompressobj(), 0, 8
    *_, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    last_row = image.crop((0, image.height - 1, image.width, image.height)).tobytes()
    row_bits = image.width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    # Only an image that may lack rows is decompressed a second time, and only up to their size: more may be a bomb.
    num_expected = 0 if interlaced or any(last_row) else image.height * (1 + (row_bits + 7) // 8)
    while at + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        data = memoryview(content)[at + 4 : at + 8 + length]
        at += 12 + length
        if name != b"IDAT" or at > len(content):
            continue
        if zlib.crc32(data).to_bytes(4, "big") != content[at - 4 : at]:
            raise ImageFault(FaultKind.UNREADABLE, "PNG: damaged (wrong checksum of the pixel data)")
        rest: bytes | memoryview = data[4:]
        while rest and num_bytes < num_expected:
            num_bytes += len(inflate.decompress(rest, 1 << 20))  # In pieces, to use little memory.
            rest = inflate.unconsumed_tail
    if num_bytes < num_expected:
        raise ImageFault(FaultKind.TRUNCATED, f"PNG: {_TRUNCATED} (too few rows)")
