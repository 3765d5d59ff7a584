"""Damaged, mislabelled, unsupported and unusual image files, each with the row that it must produce.

The files are built on each call and have the same bytes for a given version of Pillow, so the repository holds no
binary files.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from segray.errors import FaultKind

_TIFF_CODES = {1: "B", 3: "H", 4: "I"}


@dataclass(frozen=True)
class Poison:
    """One file, and the row that it produces with the default settings.

    Attributes:
        name: File name, with an extension that is listed as an image.
        content: The content of the file.
        kind: ``error_kind``; None if the file can be decoded.
        message: Regular expression that ``error_message`` must match.
        size: Height and width, if the file can be decoded.
        note: ``note``, if the file can be decoded.
    """

    name: str
    content: bytes
    kind: FaultKind | None = None
    message: str = ""
    size: tuple[int, int] | None = None
    note: str | None = None


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """Encode an image with Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def encode_frames(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """Encode an image and two different ones as the frames of one file."""
    more = [image.rotate(180), image.rotate(90)]  # Created on each call, because saving leaves settings on images.
    return encode(image, file_format, save_all=True, append_images=more, **options)


def build_chunk(name: bytes, data: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def build_png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """Return a PNG with the given header; ``rows`` are any number of rows, each with its filter byte.

    ``extra`` are chunks between header and data.
    """
    header = build_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = build_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + extra + data + build_chunk(b"IEND", b"")


@dataclass(frozen=True)
class TiffOptions:
    """Options of ``build_tiff``.

    Attributes:
        byte_order: ``<`` for little endian, ``>`` for big endian.
        compression: Value of the tag ``Compression``; 1 is none.
        next_at: Offset of the next directory; 0 if there is none.
        extra_tags: Further tags: number, type and values.
    """

    byte_order: str = "<"
    compression: int = 1
    next_at: int = 0
    extra_tags: Sequence[tuple[int, int, Sequence[int]]] = ()


def build_tiff(
    width: int,
    height: int,
    bits: Sequence[int],
    photometric: int,
    pixels: bytes,
    options: TiffOptions = TiffOptions(),
) -> bytes:
    """Return a TIFF with one strip; its directory is at offset 8."""
    order = options.byte_order
    tags: list[tuple[int, int, Sequence[int]]] = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, bits),
        (259, 3, [options.compression]),
        (262, 3, [photometric]),
        (273, 4, [0]),  # offset of the pixels, which are at the end of the file; set below
        (277, 3, [len(bits)]),
        (278, 4, [height]),
        (279, 4, [len(pixels)]),
        *options.extra_tags,
    ]
    values_at = 8 + 2 + 12 * len(tags) + 4
    packed = [struct.pack(f"{order}{len(values)}{_TIFF_CODES[kind]}", *values) for _, kind, values in tags]
    pixels_at = values_at + sum(len(value) for value in packed if len(value) > 4)
    packed[5] = struct.pack(f"{order}I", pixels_at)
    entries, outside = b"", b""
    for (tag, kind, values), value in sorted(zip(tags, packed, strict=True)):
        entries += struct.pack(f"{order}HHI", tag, kind, len(values))
        if len(value) > 4:
            entries += struct.pack(f"{order}I", values_at + len(outside))
            outside += value
        else:
            entries += value.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + struct.pack(f"{order}I", options.next_at) + outside + pixels


def build_samples() -> dict[str, bytes]:
    """Return a small valid file of each format and encoding, by name."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8))
    smooth = Image.fromarray(np.add.outer(np.arange(20) * 4, np.arange(30) * 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "png": encode(photo, exif=exif),
        "png_smooth": encode(smooth),
        "png_palette": encode(photo.quantize(16), transparency=3),
        "png_frames": encode_frames(photo),
        "jpeg": encode(photo, "JPEG", exif=exif),
        "jpeg_progressive": encode(smooth, "JPEG", progressive=True),
        "jpeg_frames": encode_frames(photo, "MPO"),
        "webp": encode(photo, "WEBP", exif=exif),
        "webp_lossless": encode(photo, "WEBP", lossless=True),
        "webp_frames": encode_frames(photo, "WEBP", lossless=True),
        "bmp": encode(photo, "BMP"),
        "bmp_palette": encode(photo.quantize(16), "BMP"),
        "gif": encode(photo.quantize(16), "GIF"),
        "gif_frames": encode_frames(photo, "GIF"),
        "tiff": encode(photo, "TIFF"),
        "tiff_lzw": encode(smooth, "TIFF", compression="tiff_lzw"),
        "tiff_jpeg": encode(photo, "TIFF", compression="jpeg"),
        "tiff_frames": encode_frames(photo, "TIFF", compression="tiff_adobe_deflate"),
        "tiff_big": encode(photo, "TIFF", big_tiff=True),
        "tiff_directory_first": build_tiff(
            20, 20, [8], 1, zlib.compress(bytes(range(200)) * 2), TiffOptions(compression=8)
        ),
    }


def build_poison() -> tuple[Poison, ...]:
    """Return all poison files."""
    return (
        *_build_mislabelled(),
        *_build_png(),
        *_build_jpeg(),
        *_build_gif(),
        *_build_bmp(),
        *_build_tiff(),
        *_build_webp(),
    )


def _build_mislabelled() -> tuple[Poison, ...]:
    """Return files whose content does not match their name."""
    pdf = b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\ntrailer\n<< /Root 1 0 R >>\n%%EOF\n"
    page = b"<!DOCTYPE html>\n<html><head><title>403</title></head><body>Forbidden<svg></svg></body></html>\n"
    svg = b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg" width="4" height="3"/>\n'
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
    psd = b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(64)
    wav = b"RIFF\x2c\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x40\x1f\0\0\x40\x1f\0\0\x01\0\x08\0data\x08\0\0\0" + bytes(8)
    photo = Image.fromarray(np.random.default_rng(5).integers(0, 256, (21, 31, 3), np.uint8))
    other_formats = [
        ("page.png", pdf, "PDF"),
        ("phone.jpg", heic, "HEIC"),
        ("logo.png", svg, "SVG"),
        ("layers.jpg", psd, "PSD"),
        ("plot.png", eps, "PostScript"),
    ]
    return (
        Poison("empty.png", b"", FaultKind.UNREADABLE, "^empty file$"),
        Poison("one_byte.jpg", b"\xff", FaultKind.UNREADABLE, "^not an image file; expected one of PNG, JPEG"),
        Poison("text.png", b"see the folder next door\n", FaultKind.UNREADABLE, "^not an image"),
        Poison("error_page.jpg", page, FaultKind.UNREADABLE, "^not an image"),
        Poison("sound.webp", wav, FaultKind.UNREADABLE, "^not an image"),
        *(
            Poison(name, content, FaultKind.UNSUPPORTED, f"^{called} file; convert it to one of PNG, JPEG")
            for name, content, called in other_formats
        ),
        Poison("png_inside.jpg", encode(photo), size=(21, 31)),  # the format is detected from the content
    )


def _build_png() -> tuple[Poison, ...]:
    noise = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
    whole = encode(Image.fromarray(noise))
    header_end, data_at = 33, 41  # after the checksum of IHDR; after the name of the first IDAT
    bad_header, bad_checksum, flipped = bytearray(whole), bytearray(whole), bytearray(whole)
    bad_header[header_end - 1] ^= 1
    bad_checksum[-13] ^= 1
    flipped[(data_at + len(whole)) // 2] ^= 0x10
    text_bomb = build_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000)))
    turned = Image.Exif()
    turned[0x0112] = 6
    row = b"\0" + bytes(3 * 60)
    return (
        Poison("signature_only.png", whole[:8], FaultKind.TRUNCATED, "^PNG: the file is truncated"),
        Poison("header_only.png", whole[:header_end], FaultKind.TRUNCATED, "^PNG: the file is truncated"),
        Poison("cut_in_data.png", whole[: len(whole) // 2], FaultKind.TRUNCATED, "^PNG: the file is truncated"),
        Poison("no_end.png", whole[:-12], size=(40, 60)),  # all pixels are present
        Poison("bad_header_checksum.png", bytes(bad_header), FaultKind.UNREADABLE, "^PNG: damaged .*IHDR"),
        Poison("bad_data_checksum.png", bytes(bad_checksum), FaultKind.UNREADABLE, "^PNG: damaged .*checksum"),
        Poison("flipped_byte.png", bytes(flipped), FaultKind.UNREADABLE, "^PNG: damaged"),
        Poison("too_few_rows.png", build_png(60, 40, 8, 2, 7 * row), FaultKind.TRUNCATED, "too few rows"),
        Poison(
            "declared_huge.png", build_png(100_000, 100_000, 8, 2, row), FaultKind.TOO_LARGE, "^100000x100000 pixels"
        ),
        Poison("bomb.png", build_png(12_000, 12_000, 1, 0, bytes(1501 * 12_000)), FaultKind.TOO_LARGE, "^12000x12000 "),
        Poison(
            "text_bomb.png",
            build_png(60, 1, 8, 2, row, text_bomb),
            FaultKind.TOO_LARGE,
            "^PNG: its text .*suspicious size",
        ),
        Poison("zero_width.png", build_png(0, 5, 8, 2, bytes(5)), FaultKind.UNREADABLE, "^PNG: it has no pixels"),
        Poison("turned.png", encode(Image.fromarray(noise), exif=turned), size=(60, 40)),
        Poison("one_pixel.png", build_png(1, 1, 8, 2, b"\0abc"), size=(1, 1)),
        Poison("thin.png", build_png(1, 20_000, 8, 0, b"\0\x80" * 20_000), size=(20_000, 1)),
    )


def _build_jpeg() -> tuple[Poison, ...]:
    whole = encode(Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 60, 3), np.uint8)), "JPEG")
    scan_at, frame_at = whole.index(b"\xff\xda"), whole.index(b"\xff\xc0")
    middle = (scan_at + len(whole)) // 2
    garbage = np.random.default_rng(3).integers(0, 255, 60, np.uint8).tobytes()  # no byte 255, so no marker
    twelve_bits = bytearray(whole)
    twelve_bits[frame_at + 1], twelve_bits[frame_at + 4] = 0xC1, 12
    exif = b"\xff\xe1\0\x20Exif\0\0" + garbage[:24]
    return (
        Poison("half.jpg", whole[:middle], FaultKind.TRUNCATED, "^JPEG: the file is truncated"),
        Poison("no_scan.jpg", whole[:scan_at], FaultKind.TRUNCATED, "^JPEG: the file is truncated"),
        # JPEG has no checksum: decoders and viewers continue, with wrong colours below the damage.
        Poison("garbage_inside.jpg", whole[:middle] + garbage + whole[middle + 60 :], size=(40, 60)),
        Poison("garbage_behind.jpg", whole + garbage, size=(40, 60)),
        Poison("broken_exif.jpg", whole[:2] + exif + whole[2:], size=(40, 60)),
        Poison("twelve_bits.jpg", bytes(twelve_bits), FaultKind.UNSUPPORTED, "^JPEG: .*convert.*12-bit"),
    )


def _build_noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(4).integers(0, 256, (20, 30), np.uint8))


def _build_gif() -> tuple[Poison, ...]:
    noise = _build_noise()
    gif = encode(noise, "GIF")
    screen = b"GIF89a" + struct.pack("<HH", 30_000, 30_000) + b"\0\0\0"
    clear_after = b"!\xf9\x04\x08\0\0\0\0"
    frame = b"," + struct.pack("<HHHH", 0, 0, 30_000, 30_000) + b"\0\x08\x01\0\0;"
    return (
        Poison("cut.gif", gif[: len(gif) * 3 // 4], FaultKind.TRUNCATED, "^GIF: the file is truncated"),
        Poison("no_frames.gif", gif[:13] + b";", FaultKind.UNREADABLE, "^GIF: damaged"),
        Poison("animated.gif", encode_frames(noise, "GIF"), size=(20, 30), note="first of 3 frames"),
        Poison("bomb.gif", screen + clear_after + frame, FaultKind.TOO_LARGE, "^30000x30000 pixels"),
    )


def _build_bmp() -> tuple[Poison, ...]:
    bmp = encode(_build_noise(), "BMP")
    longer, top_down, taller = bytearray(bmp), bytearray(bmp), bytearray(bmp)
    taller[22:26] = struct.pack("<i", 200)
    longer[2:6] = struct.pack("<I", 2**31)
    top_down[22:26] = struct.pack("<i", -20)
    return (
        Poison("wrong_length.bmp", bytes(longer), size=(20, 30)),  # decoders ignore this field
        Poison("too_few_rows.bmp", bytes(taller), FaultKind.TRUNCATED, "^BMP: the file is truncated"),
        Poison("top_down.bmp", bytes(top_down), size=(20, 30)),
    )


def _build_tiff() -> tuple[Poison, ...]:
    noise = _build_noise()
    tiff, packed = encode(noise, "TIFF"), encode(noise, "TIFF", compression="tiff_lzw")
    grey = (4, 3, [8], 1, bytes(12))
    two_pages = build_tiff(*grey, TiffOptions(next_at=len(build_tiff(*grey))))
    loop = two_pages + two_pages[8 : 8 + 2 + 9 * 12] + struct.pack("<I", 8)  # the second page points to the first
    other_compression = build_tiff(*grey, TiffOptions(compression=34712))
    return (
        Poison("cut.tif", tiff[: len(tiff) // 2], FaultKind.TRUNCATED, "^TIFF: the file is truncated"),
        Poison("cut_directory.tif", packed[:-40], FaultKind.TRUNCATED, "^TIFF: the file is truncated"),
        Poison("loop.tif", loop, size=(3, 4), note="first of 2 frames"),
        Poison("pages.tiff", encode_frames(noise, "TIFF"), size=(20, 30), note="first of 3 frames"),
        Poison("broken_second_page.tif", two_pages, size=(3, 4), note="first of several frames"),
        Poison(
            "float.tif", encode(noise.convert("F"), "TIFF"), FaultKind.UNSUPPORTED, "^floating-point pixels; convert"
        ),
        Poison(
            "bands.tif",
            build_tiff(2, 2, [8] * 8, 1, bytes(32)),
            FaultKind.UNSUPPORTED,
            "^TIFF: its channels, bit depth",
        ),
        Poison("no_colours.tif", build_tiff(4, 3, [8], 3, bytes(12)), FaultKind.UNREADABLE, "^TIFF: damaged"),
        Poison("jpeg2000.tif", other_compression, FaultKind.UNSUPPORTED, "^TIFF: its compression"),
    )


def _build_webp() -> tuple[Poison, ...]:
    noise = _build_noise()
    webp = encode(noise, "WEBP")
    canvas = bytearray(encode_frames(noise.convert("RGB"), "WEBP"))
    # The header holds width - 1 and height - 1.
    canvas[24:30] = (16_382).to_bytes(3, "little") + (10_999).to_bytes(3, "little")
    return (
        Poison("cut.webp", webp[: len(webp) // 2], FaultKind.TRUNCATED, "^WebP: the file is truncated"),
        Poison("bomb.webp", bytes(canvas), FaultKind.TOO_LARGE, "^16383x11000 pixels"),
        Poison(
            "animated.webp",
            encode_frames(noise.convert("RGB"), "WEBP", lossless=True),
            size=(20, 30),
            note="first of 3 frames",
        ),
    )
