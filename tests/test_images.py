"""Decoding: what a viewer shows, for every kind of image file, and one kind of fault for every way to be broken."""

import io

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch.nn import functional

from segray.errors import FaultKind, ImageFault
from segray.images import decode_image, decode_mask, encode_mask_png, resize_image, resize_mask

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_decode_to_the_same_pixels(file_format: str) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(RGB), file_format, **options)), RGB)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(RGB).convert("P" if mode == "P" else mode)
    file_format = "TIFF" if mode == "CMYK" else "PNG"
    decoded = decode_image(encode(image, file_format))
    assert decoded.shape == (6, 9, 3)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_scaled_to_eight() -> None:
    grey = np.array([[0, 257, 65_535], [32_896, 65_278, 256]], np.uint16)
    decoded = decode_image(encode(Image.fromarray(grey)))
    np.testing.assert_array_equal(decoded[..., 0], [[0, 1, 255], [128, 254, 0]])


def test_exif_orientation_is_applied_to_image_and_mask() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(RGB), exif=exif)), np.rot90(RGB, -1))
    mask = RGB[..., 0]
    np.testing.assert_array_equal(decode_mask(encode(Image.fromarray(mask), exif=exif)), np.rot90(mask, -1))


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("P", (4, 3), color) for color in (0, 1)]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(content), np.asarray(frames[0].convert("RGB")))


WHOLE_PNG = encode(Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)))
WHOLE_JPEG = encode(Image.fromarray(RGB).resize((64, 64)), "JPEG")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", FaultKind.UNREADABLE),
        (b"hello", FaultKind.UNREADABLE),
        (b"\x89PNG\r\n\x1a\n", FaultKind.UNREADABLE),
        (WHOLE_PNG[:-200], FaultKind.TRUNCATED),
        (WHOLE_JPEG[: len(WHOLE_JPEG) // 2], FaultKind.TRUNCATED),
        (WHOLE_PNG[:60] + bytes(40) + WHOLE_PNG[100:], FaultKind.UNREADABLE),
        (encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), FaultKind.UNSUPPORTED),
        (encode(Image.new("1", (2000, 2000))), FaultKind.TOO_LARGE),
        (encode(Image.fromarray(RGB), "PDF"), FaultKind.UNREADABLE),
    ],
)
def test_a_broken_image_is_a_fault_of_its_kind(content: bytes, kind: FaultKind) -> None:
    with pytest.raises(ImageFault) as caught:
        decode_image(content, max_px=1_000_000)
    assert caught.value.kind == kind


def test_masks_keep_their_raw_values() -> None:
    values = np.array([[0, 1, 255], [7, 7, 3]], np.uint8)
    np.testing.assert_array_equal(decode_mask(encode(Image.fromarray(values))), values)
    palette = Image.fromarray(values)
    palette.putpalette(list(range(255, -1, -1)) * 3)
    assert palette.mode == "P"
    np.testing.assert_array_equal(decode_mask(encode(palette)), values)
    wide = values.astype(np.uint16) * 200
    np.testing.assert_array_equal(decode_mask(encode(Image.fromarray(wide))), wide)


def test_a_coloured_mask_is_refused() -> None:
    with pytest.raises(ImageFault, match="greyscale or palette") as caught:
        decode_mask(encode(Image.fromarray(RGB)))
    assert caught.value.kind == FaultKind.MASK_MISMATCH


@pytest.mark.parametrize(("num_classes", "dtype"), [(3, np.uint8), (300, np.uint16)])
def test_mask_png_reads_back(num_classes: int, dtype: type) -> None:
    mask: npt.NDArray[np.integer] = np.random.default_rng(0).integers(0, num_classes, (11, 13)).astype(dtype)
    image = Image.open(io.BytesIO(encode_mask_png(mask, num_classes)))
    np.testing.assert_array_equal(np.asarray(image), mask)
    assert image.mode == ("P" if num_classes <= 256 else "I;16")


def test_resizing_a_mask_never_mixes_values() -> None:
    mask = np.random.default_rng(0).choice([0, 7, 255], (30, 41)).astype(np.uint8)
    for size in [(15, 20), (64, 99), (30, 41)]:
        resized = resize_mask(mask, size)
        assert resized.shape == size
        assert set(np.unique(resized)) <= {0, 7, 255}
    np.testing.assert_array_equal(resize_mask(mask, (60, 82)), mask.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("size", [(64, 64), (17, 40), (31, 93), (90, 41)])
def test_a_resized_mask_has_the_pixel_at_each_centre_as_torchs_nearest_exact(size: tuple[int, int]) -> None:
    mask = np.random.default_rng(1).integers(0, 256, (31, 41), np.uint8)
    witness = functional.interpolate(torch.from_numpy(mask)[None, None], size=size, mode="nearest-exact")
    np.testing.assert_array_equal(resize_mask(mask, size), witness[0, 0].numpy())


def test_resizing_keeps_image_and_mask_aligned() -> None:
    mask = np.zeros((90, 120), np.uint8)
    mask[30:60, 40:80] = 1
    image = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    small_image, small_mask = resize_image(image, (30, 40)), resize_mask(mask, (30, 40))
    np.testing.assert_array_equal(small_image[..., 0] > 127, small_mask == 1)
