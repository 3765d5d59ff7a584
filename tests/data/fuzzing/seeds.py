"""Small valid files in every supported format and mode, from which the mutated ones are made."""

import struct
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from tests.poison import TiffOptions, build_chunk, build_png, build_samples, build_tiff, encode, encode_frames

_SIZE = (19, 26)  # Height and width: no multiple of a block of JPEG, and odd.
_XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


@cache
def build_seeds() -> dict[str, tuple[bytes, ...]]:
    """Return the files by format; with the same version of Pillow, they have the same bytes."""
    samples = build_samples()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*_SIZE, 3), np.uint8))
    smooth = Image.fromarray(np.add.outer(np.arange(_SIZE[0]) * 9, np.arange(_SIZE[1]) * 4).astype(np.uint8))
    formats = {
        "png": _build_png(photo, smooth),
        "jpeg": _build_jpeg(photo, smooth),
        "webp": _build_webp(photo, smooth),
        "bmp": _build_bmp(photo, smooth),
        "gif": _build_gif(photo, smooth),
        "tiff": _build_tiff(photo, smooth),
    }
    return {
        name: tuple(files) + tuple(content for other, content in samples.items() if other.startswith(name))
        for name, files in formats.items()
    }


def _build_exif() -> bytes:
    """Return EXIF data with an orientation and nested directories."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0132] = 6, "maker", "2026:01:01 00:00:00"
    exif.get_ifd(0x8769).update({0x829A: 0.01, 0x927C: b"Nikon\0" + bytes(40)})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    return exif.tobytes()


def _build_png(photo: Image.Image, smooth: Image.Image) -> list[bytes]:
    grey16 = Image.fromarray(np.asarray(smooth).astype(np.uint16) * 257)
    modes = [photo.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    text = build_chunk(b"tEXt", b"Comment\0some text") + build_chunk(b"gAMA", struct.pack(">I", 45_455))
    rows = b"\0" + bytes(range(3 * _SIZE[1]))
    return [
        *(encode(image) for image in (*modes, grey16)),
        encode(smooth, bits=4),
        encode(photo, exif=_build_exif(), icc_profile=bytes(200)),
        encode_frames(smooth.convert("RGBA"), default_image=True),
        build_png(_SIZE[1], _SIZE[0], 8, 2, rows * _SIZE[0], text),
        _build_interlaced(np.asarray(photo)),
    ]


def _build_interlaced(image_hwc: npt.NDArray[np.uint8]) -> bytes:
    height, width, _ = image_hwc.shape
    passes = [image_hwc[top::down, left::right] for top, left, down, right in _ADAM7]
    rows = b"".join(b"\0" + row.tobytes() for part in passes for row in part if row.size)
    content = build_png(width, height, 8, 2, rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    return content[:8] + build_chunk(b"IHDR", header) + content[33:]


def _build_jpeg(photo: Image.Image, smooth: Image.Image) -> list[bytes]:
    large = smooth.convert("RGB").resize((80, 64))  # Reduced when decoded for a small model input.
    return [
        encode(smooth, "JPEG"),
        encode(photo, "JPEG", subsampling=0, quality=95),
        encode(photo, "JPEG", subsampling=1, optimize=True, restart_marker_blocks=2),
        encode(photo.convert("CMYK"), "JPEG"),
        encode(photo, "JPEG", progressive=True, comment=b"a comment"),
        encode(large, "JPEG", progressive=True, exif=_build_exif()),
        encode(large, "JPEG", exif=_build_exif(), icc_profile=bytes(300)),
        encode(large, "JPEG", xmp=_XMP, dpi=(72, 72)),
    ]


def _build_webp(photo: Image.Image, smooth: Image.Image) -> list[bytes]:
    clear = photo.copy()
    clear.putalpha(smooth)
    return [
        encode(clear, "WEBP", exact=True),
        encode(clear, "WEBP", lossless=True),
        encode(smooth.convert("RGB"), "WEBP", quality=20, exif=_build_exif(), xmp=_XMP, icc_profile=bytes(100)),
        encode_frames(clear, "WEBP"),
    ]


def _build_bmp(photo: Image.Image, smooth: Image.Image) -> list[bytes]:
    modes = [encode(photo.convert(mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")]
    top_down = bytearray(modes[3])
    top_down[22:26] = struct.pack("<i", -_SIZE[0])
    width, height = 8, 6
    coded = (b"\x05\x01\0\x03\x02\x03\x04\0\0\0" + b"\0\x02\x01\x01\x04\x07\0\0") + b"\x08\x02\0\0" * 3 + b"\0\1"
    palette = bytes(range(64))
    head = struct.pack("<2sIHHI", b"BM", 14 + 40 + 64 + len(coded), 0, 0, 14 + 40 + 64)
    rle = [
        head
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, method, len(coded), 0, 0, 16, 0)
        + palette
        + coded
        for bits, method in ((8, 1), (4, 2))
    ]
    fields = encode(photo.convert("RGB").convert("RGBA"), "BMP")
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    bit_fields = fields[:10] + struct.pack("<IIiiHHIIiiII", 70, 56, *reversed(_SIZE), 1, 32, 3, 0, 0, 0, 0, 0) + masks
    old = struct.pack("<2sIHHIIHHHH", b"BM", 0, 0, 0, 26 + 48, 12, 8, 4, 1, 4) + bytes(48) + bytes(16)
    return [*modes, bytes(top_down), *rle, bit_fields + bytes(4 * _SIZE[0] * _SIZE[1]), old, encode(smooth, "BMP")]


def _build_gif(photo: Image.Image, smooth: Image.Image) -> list[bytes]:
    return [
        encode(photo, "GIF"),
        encode(smooth, "GIF", interlace=False, comment=b"a comment"),
        encode(photo.convert("P"), "GIF", transparency=3),
        encode_frames(photo, "GIF", duration=20, loop=0, disposal=2),
        encode_frames(smooth, "GIF", disposal=3),
    ]


def _build_tiff(photo: Image.Image, smooth: Image.Image) -> list[bytes]:
    modes = [photo.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F")]
    grey16 = Image.fromarray(np.asarray(smooth).astype(np.uint16) * 257)
    packed = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma")
    black = photo.convert("1")
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[274], tags[270] = 6, "a description"
    tile = [(322, 3, [16]), (323, 3, [16]), (324, 4, [8]), (325, 4, [256])]
    strip_tags = ((273, 4, [60]), (279, 4, [10]))
    return [
        *(encode(image, "TIFF") for image in (*modes, grey16)),
        *(encode(photo, "TIFF", compression=name) for name in packed),
        *(encode(smooth, "TIFF", compression=name) for name in ("tiff_lzw", "jpeg")),
        *(encode(black, "TIFF", compression=name) for name in ("group3", "group4", "tiff_ccitt")),
        encode(photo, "TIFF", tiffinfo=tags, compression="tiff_lzw", strip_size=200),
        encode_frames(photo, "TIFF", compression="jpeg"),
        encode(photo, "TIFF", big_tiff=True, compression="tiff_lzw"),
        build_tiff(16, 16, [8], 1, bytes(256), TiffOptions(">", extra_tags=tile)),
        build_tiff(6, 5, [16, 16, 16], 2, bytes(180), TiffOptions(">", extra_tags=[(284, 3, [2])])),
        build_tiff(8, 4, [8], 1, bytes(32), TiffOptions(extra_tags=strip_tags)),
        build_tiff(8, 4, [4], 3, bytes(16), TiffOptions(extra_tags=[(320, 3, list(range(48)))])),
    ]
