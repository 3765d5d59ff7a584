"""Limits against small files that would take much memory or time: each is applied before Pillow allocates or loops.

Pillow's own limit, ``Image.MAX_IMAGE_PIXELS``, is one number per process, and does not cover tiles, frames and pages.
"""

from typing import Literal

from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from segray.errors import FaultKind, ImageFault

_TILE_WIDTH, _TILE_LENGTH = 322, 323  # Tags of a TIFF.


class FirstFrameGif(GifImageFile):
    """Reads only the first frame of a GIF, and ignores the disposal method of frames.

    When it opens a file, Pillow prepares the disposal by filling an area of the frame's declared size, up to 4 GB,
    before the size can be checked.
    """

    @property
    def disposal_method(self) -> int:
        """Always 0: none."""
        return 0

    @disposal_method.setter
    def disposal_method(self, value: int) -> None:
        pass


def check_webp_canvas(content: bytes, max_px: int) -> None:
    """Raise ``too_large`` if the header of a WebP file declares more than ``max_px`` pixels.

    The decoder allocates two canvases of 4 bytes per pixel, up to 2 GB, when it opens a file. It refuses a file without
    one of these headers.
    """
    size = 0, 0
    if content[12:16] == b"VP8X":
        size = 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    elif content[12:16] == b"VP8L" and content[20:21] == b"/":
        bits = int.from_bytes(content[21:25], "little")
        size = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif content[12:16] == b"VP8 " and content[23:26] == b"\x9d\x01\x2a":
        width, height = int.from_bytes(content[26:28], "little"), int.from_bytes(content[28:30], "little")
        size = width & 0x3FFF, height & 0x3FFF
    _check_px("", size, max_px)


def check_px(image: ImageFile, max_px: int) -> None:
    """Raise ``too_large`` if an opened image, or one tile of it, has more than ``max_px`` pixels.

    Tiles are decoded whole: one of 16384x32768 takes 0.5 to 2 GB, even in an image of 16x16, and a file of 0.5 MB.
    """
    _check_px("", image.size, max_px)
    if isinstance(image, TiffImageFile):
        width, length = image.tag_v2.get(_TILE_WIDTH), image.tag_v2.get(_TILE_LENGTH)
        if isinstance(width, int) and isinstance(length, int):  # Pillow refuses others.
            _check_px("tiles of ", (width, length), max_px)


def _check_px(what: str, size: tuple[int, int], max_px: int) -> None:
    width, height = size
    if width * height > max_px:
        message = f"{what}{width}x{height} pixels, more than the limit of {max_px}; see segment.max_image_px"
        raise ImageFault(FaultKind.TOO_LARGE, message)


def count_tiff_pages(content: bytes, limit: int) -> int:
    """Return the number of pages of a TIFF, or ``limit + 1`` if there are more.

    Only the links between directories are read. Pillow reads the tags of each page twice, which takes minutes for a
    crafted file of 1 MB: directories of 65,535 tags may overlap.

    Raises:
        ValueError: A directory is outside the file.
    """
    order: Literal["little", "big"] = "little" if content.startswith(b"II") else "big"
    is_big = content[2:3] == b"+"
    count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if is_big else (2, 12, 4)

    def read(at: int, num_bytes: int) -> int:
        return int.from_bytes(content[at : at + num_bytes], order)

    at, seen = read(offset_bytes, offset_bytes), set[int]()
    while at and at not in seen and len(seen) <= limit:
        if at + count_bytes > len(content):
            raise ValueError(f"directory at {at} in a file of {len(content)} bytes")
        seen.add(at)
        at = read(at + count_bytes + entry_bytes * read(at, count_bytes), offset_bytes)
    return len(seen)
