"""Opening image files: detection of the format, and the kind of fault that each defect is reported as."""

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from segray.data.images import (
    decode_image,
    decode_image_with_note,
    decode_mask,
)
from segray.errors import FaultKind, ImageFault
from tests.poison import build_chunk, build_png, encode, encode_frames

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x20ftypmif1\0\0\0\0", "HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "AVIF"),
        (b"%PDF-1.4\n", "PDF"),
        (b"\xc5\xd0\xd3\xc6\x20\0\0\0", "PostScript"),
        (b"8BPS\0\1", "PSD"),
        (b"\xef\xbb\xbf<?xml version='1.0' encoding='UTF-8'?>\r\n<!DOCTYPE svg PUBLIC ''>\r\n<svg/>", "SVG"),
        (b"  <svg viewBox='0 0 1 1'/>", "SVG"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x4f\xff\x51\0\x2f", "JPEG 2000"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a\x7a\x01", "JPEG XL"),
        (b"\x76\x2f\x31\x01\2\0\0\0", "OpenEXR"),
        (b"DDS \x7c\0\0\0", "DDS"),
        (b"\0\0\1\0\1\0\x10\x10", "ICO"),
        (b"MM\0\x2b\0\x08\0\0" + (16).to_bytes(8, "big"), "big-endian BigTIFF"),
    ],
)
def test_an_unsupported_format_is_named_in_the_error(start: bytes, name: str) -> None:
    with pytest.raises(
        ImageFault, match=f"^{name} file; convert it to one of PNG, JPEG, WebP, BMP, GIF, TIFF$"
    ) as caught:
        decode_image(start + bytes(100))
    assert caught.value.kind == FaultKind.UNSUPPORTED


@pytest.mark.parametrize(
    "content", [b"<?xml version='1.0'?><html><svg/></html>", b"BMW and other makes", b"II and MM" * 9]
)
def test_text_that_starts_like_an_image_is_unreadable(content: bytes) -> None:
    with pytest.raises(ImageFault) as caught:
        decode_image(content + bytes(100))
    assert caught.value.kind in (FaultKind.UNREADABLE, FaultKind.TRUNCATED)


@pytest.mark.parametrize(("at", "value"), [(28, 13), (30, 4), (30, 3)])
def test_an_unusual_bmp_is_unsupported(at: int, value: int) -> None:
    """The three files have 13 bits per pixel, an embedded JPEG, and an unusual layout of bit fields."""
    content = bytearray(encode(Image.fromarray(RGB), "BMP"))
    content[at] = value
    with pytest.raises(
        ImageFault, match=r"^BMP: its channels, bit depth or compression are not supported; convert"
    ) as caught:
        decode_image(bytes(content))
    assert caught.value.kind == FaultKind.UNSUPPORTED


def test_an_unsupported_bigtiff_is_not_reported_as_truncated() -> None:
    content = encode(Image.fromarray(RGB), "TIFF", big_tiff=True)
    np.testing.assert_array_equal(decode_image(content), RGB)
    compression = struct.pack("<HHQ", 259, 3, 1)
    content = content.replace(compression + b"\1\0", compression + struct.pack("<H", 34712))
    with pytest.raises(ImageFault, match=r"^TIFF: its compression is not supported; .* \(34712\)$"):
        decode_image(content)


def test_the_first_picture_of_a_multi_picture_jpeg_is_decoded() -> None:
    first = Image.fromarray(RGB).resize((64, 48))
    content = encode_frames(first, "MPO")
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.format == "MPO"
    decoded, note = decode_image_with_note(content)
    np.testing.assert_array_equal(decoded, decode_image(encode(first, "JPEG")))
    assert note is None  # Cameras add pictures to each photograph: a preview, or a depth map.


def test_a_jpeg_with_a_broken_index_of_pictures_is_decoded() -> None:
    content = encode_frames(Image.fromarray(RGB), "MPO")
    count_at = content.index(struct.pack("<HHI", 0xB001, 4, 1), content.index(b"MPF\0")) + 8
    entries_at = content.index(struct.pack("<HH", 0xB002, 7), count_at)
    for broken in (
        content[:count_at] + struct.pack("<I", 200) + content[count_at + 4 :],
        content[:entries_at] + b"\0\0" + content[entries_at + 2 :],
    ):
        np.testing.assert_array_equal(decode_image(broken), decode_image(content))


WHOLE_PNG = encode(Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)))

WHOLE_JPEG = encode(Image.fromarray(RGB).resize((64, 64)), "JPEG")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", FaultKind.UNREADABLE),
        (b"hello", FaultKind.UNREADABLE),
        (b"\x89PNG\r\n\x1a\n", FaultKind.TRUNCATED),
        (WHOLE_PNG[:-200], FaultKind.TRUNCATED),
        (WHOLE_JPEG[: len(WHOLE_JPEG) // 2], FaultKind.TRUNCATED),
        (WHOLE_PNG[:60] + bytes(40) + WHOLE_PNG[100:], FaultKind.UNREADABLE),
        (encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), FaultKind.UNSUPPORTED),
        (encode(Image.new("1", (2000, 2000))), FaultKind.TOO_LARGE),
        (encode(Image.fromarray(RGB), "PDF"), FaultKind.UNSUPPORTED),
    ],
)
def test_a_broken_image_raises_the_matching_fault_kind(content: bytes, kind: FaultKind) -> None:
    with pytest.raises(ImageFault) as caught:
        decode_image(content, max_px=1_000_000)
    assert caught.value.kind == kind


def test_a_jpeg_mask_is_unsupported() -> None:
    with pytest.raises(
        ImageFault, match=r"^JPEG file, whose compression changes class values; create .* as PNG$"
    ) as caught:
        decode_mask(WHOLE_JPEG)
    assert caught.value.kind == FaultKind.UNSUPPORTED


def test_black_rows_are_not_mistaken_for_missing_rows() -> None:
    for depth, colour, bits in ((8, 2, 24), (1, 0, 1), (16, 6, 64), (4, 3, 4)):
        rows = bytes((1 + (13 * bits + 7) // 8) * 50)
        extra = build_chunk(b"PLTE", bytes(3)) if colour == 3 else b""
        assert not decode_image(build_png(13, 50, depth, colour, rows, extra)).any()
        with pytest.raises(ImageFault, match="truncated"):
            decode_image(build_png(13, 50, depth, colour, rows[: -len(rows) // 50], extra))


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (PngImagePlugin.PngImageFile, "_open"),
        (ImageFile.ImageFile, "load"),
        (Image.Image, "getexif"),
        (Image.Image, "convert"),
    ],
)
def test_a_memory_error_is_not_converted_to_an_image_fault(
    owner: type, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, method, raise_error(MemoryError()))
    with pytest.raises(MemoryError):
        decode_image(WHOLE_PNG)


@pytest.mark.parametrize("decode", [decode_image, decode_mask])
@pytest.mark.parametrize(
    ("owner", "method"),
    [(PngImagePlugin.PngImageFile, "_open"), (ImageFile.ImageFile, "load"), (np, "asarray")],
)
def test_any_exception_while_decoding_becomes_an_image_fault(
    decode: Callable[[bytes], object], owner: object, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encode(Image.new("L", (3, 3), 1))
    monkeypatch.setattr(owner, method, raise_error(RuntimeError("of a\nnew kind")))
    with pytest.raises(ImageFault, match=r"^PNG: damaged \(of a new kind\)$") as caught:
        decode(content)
    assert caught.value.kind == FaultKind.UNREADABLE


def test_orientation_is_applied_even_if_exif_cannot_be_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(Image.fromarray(RGB), exif=exif)
    monkeypatch.setattr(Image.Exif, "tobytes", raise_error(struct.error("a tag of another type")))
    np.testing.assert_array_equal(decode_image(content), np.rot90(RGB, -1))


def raise_error(error: Exception) -> Callable[..., object]:
    def fail(*_args: object, **_options: object) -> object:
        raise error

    return fail
