"""Small crafted files that would take much memory or time: each limit is applied before Pillow allocates or loops."""

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, _webp
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from segray.data import image_files
from segray.data.images import decode_image_with_note
from segray.errors import FaultKind, ImageFault
from tests.poison import TiffOptions, build_chunk, build_png, build_tiff, encode, encode_frames

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8))


def declare_webp_size(content: bytes) -> bytes:
    """Return a WebP file whose header declares 16383x11000 pixels; two canvases of this size take 1.4 GB."""
    width, height, declared = 16_383, 11_000, bytearray(content)
    match content[12:16]:
        case b"VP8X":
            declared[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        case b"VP8L":
            declared[21:25] = struct.pack("<I", (width - 1) | (height - 1) << 14)
        case _:
            declared[26:30] = struct.pack("<HH", width, height)
    return bytes(declared)


@pytest.mark.parametrize(
    "content",
    [encode(PHOTO, "WEBP"), encode(PHOTO, "WEBP", lossless=True), encode_frames(PHOTO, "WEBP")],
    ids=["lossy", "lossless", "frames"],
)
def test_a_huge_webp_is_refused_before_its_canvas_is_allocated(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    decode_image_with_note(content, max_px=54)
    monkeypatch.setattr(_webp, "WebPAnimDecoder", None)
    for huge, px in ((content, 53), (declare_webp_size(content), 100_000_000)):
        with pytest.raises(ImageFault, match=rf"^\d+x\d+ pixels, more than the limit of {px}; see") as caught:
            decode_image_with_note(huge, px)
        assert caught.value.kind == FaultKind.TOO_LARGE


def test_a_webp_without_a_size_is_damaged() -> None:
    content = bytearray(encode(PHOTO, "WEBP"))
    content[12:16] = b"ICCP"
    with pytest.raises(ImageFault, match=r"^WebP: damaged") as caught:
        decode_image_with_note(bytes(content), max_px=1)
    assert caught.value.kind == FaultKind.UNREADABLE


def build_tiled(width: int, length: int, pixels: bytes) -> bytes:
    """Return a TIFF of 16x16 grey pixels in one tile of the given size."""
    tags = [(322, 4, [width]), (323, 4, [length]), (324, 4, [0]), (325, 4, [len(pixels)])]
    content = build_tiff(16, 16, [8], 1, pixels, TiffOptions(extra_tags=tags))
    for strip_tag in (273, 278, 279):  # Replaced by private tags, which are ignored.
        content = content.replace(struct.pack("<HHI", strip_tag, 4, 1), struct.pack("<HHI", 65_000 + strip_tag, 4, 1))
    offset = struct.pack("<HHI", 324, 4, 1)
    return content.replace(offset + bytes(4), offset + struct.pack("<I", len(content) - len(pixels)))


def test_a_huge_tile_is_refused() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (32, 16), np.uint8)
    decoded, _ = decode_image_with_note(build_tiled(16, 32, pixels.tobytes()), max_px=512)
    np.testing.assert_array_equal(decoded[..., 0], pixels[:16])
    for content, px in (
        (build_tiled(16, 32, pixels.tobytes()), 511),
        (build_tiled(16_384, 32_768, pixels.tobytes()), 100_000_000),
    ):
        with pytest.raises(ImageFault, match=rf"^tiles of \d+x\d+ pixels, more than the limit of {px}; see") as caught:
            decode_image_with_note(content, px)
        assert caught.value.kind == FaultKind.TOO_LARGE


@pytest.mark.parametrize("options", [{}, {"big_tiff": True}], ids=["classic", "big"])
def test_the_pages_of_a_tiff_are_counted_without_reading_their_tags(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 1 MB can hold a thousand overlapping directories of 65,535 tags each."""
    loads: list[int] = []
    load = ImageFileDirectory_v2.load

    def count(directory: ImageFileDirectory_v2, file: Any) -> None:
        loads.append(1)
        load(directory, file)

    monkeypatch.setattr(ImageFileDirectory_v2, "load", count)
    assert decode_image_with_note(encode(PHOTO, "TIFF", **options))[1] is None
    num_loads = len(loads)
    assert decode_image_with_note(encode_frames(PHOTO, "TIFF", **options))[1] == "first of 3 frames"
    assert len(loads) == 2 * num_loads


def test_pages_are_counted_in_both_byte_orders_and_without_the_last_link() -> None:
    for order in "<>":
        first = build_tiff(4, 3, [8], 1, bytes(12), TiffOptions(order))
        pages = build_tiff(4, 3, [8], 1, bytes(12), TiffOptions(order, next_at=len(first))) + struct.pack(
            f"{order}H", 0
        )
        assert decode_image_with_note(first)[1] is None
        assert decode_image_with_note(pages)[1] == "first of 2 frames"


def test_a_png_is_not_decompressed_beyond_its_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixels end after 10 KB; 1 MB of such data decompresses to 1 GB, in 4 s."""
    sizes: list[int] = []

    class Counted:
        def __init__(self) -> None:
            self.inflate = zlib.decompressobj()

        def decompress(self, data: bytes, limit: int) -> bytes:
            content = self.inflate.decompress(data, limit)
            sizes.append(len(content))
            return content

        @property
        def unconsumed_tail(self) -> bytes:
            return self.inflate.unconsumed_tail

    content = build_png(100, 100, 8, 0, bytes(10_000_000))
    halves = build_chunk(b"IDAT", content[41:5000]) + build_chunk(b"IDAT", content[5000:-16])
    monkeypatch.setattr(image_files, "zlib", type("Zlib", (), {"decompressobj": Counted, "crc32": zlib.crc32}))
    for bomb in (content, content[:33] + halves + content[-12:]):
        sizes.clear()
        assert not decode_image_with_note(bomb)[0].any()
        assert 0 < sum(sizes) <= 2 * 2**20
