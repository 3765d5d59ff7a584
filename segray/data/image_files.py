"""Encoded files opened safely, whatever they claim to be: by how they begin, and each error as an ``ImageFault``."""

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
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from segray.errors import FaultKind, ImageFault, flatten_message

_SWAPPING_ORIENTATIONS = (5, 6, 7, 8)
_TIFF_PIECES = ((273, 279), (324, 325))  # tags of offsets and lengths: of strips, of tiles

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


@contextlib.contextmanager
def open_image(
    content: bytes, formats: tuple[str, ...], max_px: int, at_least_px: int | None = None
) -> Iterator[ImageFile]:
    """Give the first frame of an image file, its pixels loaded and turned as EXIF says.

    A context and not a plain call, so that what its use trips over, such as a conversion that Pillow does not have, is
    told as a fault of the file too: use the image inside.

    Args:
        content: The whole file.
        formats: What is read, by the names of this module: ``PNG``, ``JPEG``, ``WebP``, ``BMP``, ``GIF``, ``TIFF``.
        max_px: Most pixels that are decoded.
        at_least_px: A JPEG may come at a half, a quarter or an eighth of its size, no side shorter than this, if
            that divides its sides; None: as it is.

    Raises:
        ImageFault: ``unreadable``, ``truncated``, ``unsupported`` or ``too_large``; also of any error inside the
            context, but an ``ImageFault`` raised there is left as it is.
        MemoryError: The image is within the limit, but the machine is not up to it.
    """
    listed = ", ".join(formats)
    if not content:
        raise ImageFault(FaultKind.UNREADABLE, "empty file")
    name, reader = next(((name, reader) for name, start, reader in _KNOWN if start.match(content)), ("", None))
    if not name:
        raise ImageFault(FaultKind.UNREADABLE, f"not an image in {listed}")
    if reader is None or name not in formats:
        raise ImageFault(FaultKind.UNSUPPORTED, f"{name} file; convert it to one of {listed}")
    try:
        yield _load(content, reader, max_px, at_least_px)
    except (ImageFault, MemoryError):
        raise
    except Exception as error:  # a broken file raises whatever the format's parser trips over
        kind, meaning = _explain(name, content, error)
        told = "" if kind == FaultKind.TRUNCATED else f" ({flatten_message(error)})"  # the end of a file says nothing
        raise ImageFault(kind, f"{name}: {meaning}{told}") from error


def is_shown_turned(content: bytes) -> bool:
    """Say whether the EXIF orientation of an image file swaps its height and width.

    Args:
        content: A file that ``open_image`` opens.
    """
    reader = next(reader for _, start, reader in _KNOWN if reader and start.match(content))
    try:
        return reader(io.BytesIO(content)).getexif().get(ExifTags.Base.Orientation, 1) in _SWAPPING_ORIENTATIONS
    except MemoryError:
        raise
    except Exception:  # EXIF that cannot be read turns nothing
        return False


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


def _load(content: bytes, reader: Callable[[io.BytesIO], ImageFile], max_px: int, at_least_px: int | None) -> ImageFile:
    image = reader(io.BytesIO(content))
    if image.width * image.height > max_px:
        size = f"{image.width}x{image.height}"
        raise ImageFault(
            FaultKind.TOO_LARGE, f"{size} pixels, more than the limit of {max_px}; see segment.max_image_px"
        )
    if at_least_px is not None:
        _reduce(image, at_least_px)
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


def _reduce(image: ImageFile, at_least_px: int) -> None:
    """Let a JPEG be decoded at a fraction of its size; of other formats ``draft`` takes no notice."""
    for scale in (8, 4, 2):
        is_whole = not (image.width % scale or image.height % scale)  # else a pixel's part would shift all others
        if is_whole and min(image.size) // scale >= at_least_px:
            image.draft(None, (image.width // scale, image.height // scale))
            return


def get_scale(image: ImageFile) -> int:
    """Return how many times the sides of an image are those of what ``open_image`` gave of it; they divide exactly."""
    return image.decoderconfig[0] if isinstance(image, JpegImageFile) and image.decoderconfig else 1


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
