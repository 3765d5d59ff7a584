"""Decoding images as viewers show them, masks to their exact values, and resizing both without misalignment."""

import io
import struct

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch.nn import functional

from segray.data.image_files import swaps_sides
from segray.data.images import (
    decode_image,
    decode_image_reduced,
    decode_image_with_note,
    decode_mask,
    encode_mask_png,
    resize_image,
    resize_mask,
)
from segray.errors import FaultKind, ImageFault
from tests.poison import TiffOptions, build_chunk, build_png, build_tiff, encode, encode_frames

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_decode_to_the_same_pixels(file_format: str) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(RGB), file_format, **options)), RGB)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_is_converted_to_rgb(mode: str) -> None:
    image = Image.fromarray(RGB).convert("P" if mode == "P" else mode)
    file_format = "TIFF" if mode == "CMYK" else "PNG"
    decoded = decode_image(encode(image, file_format))
    assert decoded.shape == (6, 9, 3)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_greyscale_is_scaled_to_8_bits(order: str) -> None:
    grey = np.array([[0, 257, 65_535], [32_896, 65_278, 256]], np.uint16)
    eight_bits = [[0, 1, 255], [128, 254, 0]]
    raw = grey.astype(f"{order}u2").tobytes()
    for content in (encode(Image.fromarray(grey)), build_tiff(3, 2, [16], 1, raw, TiffOptions(order))):
        np.testing.assert_array_equal(decode_image(content), np.repeat(np.array(eight_bits)[..., None], 3, 2))
        np.testing.assert_array_equal(decode_mask(content), grey)


def test_16_bit_colour_keeps_the_upper_8_bits() -> None:
    wide = np.array([[[0x0102, 0x8000, 0xFFFF], [0x00FF, 0x7F80, 0xFE01]]], np.uint16)
    upper = [[[0x01, 0x80, 0xFF], [0x00, 0x7F, 0xFE]]]
    big, little = wide.astype(">u2").tobytes(), wide.astype("<u2").tobytes()
    np.testing.assert_array_equal(decode_image(build_png(2, 1, 16, 2, b"\0" + big)), upper)
    np.testing.assert_array_equal(decode_image(build_tiff(2, 1, [16] * 3, 2, big, TiffOptions(">"))), upper)
    np.testing.assert_array_equal(decode_image(build_tiff(2, 1, [16] * 3, 2, little)), upper)
    with_alpha = np.concatenate([wide, np.zeros_like(wide[..., :1])], 2).astype(">u2").tobytes()
    np.testing.assert_array_equal(decode_image(build_png(2, 1, 16, 6, b"\0" + with_alpha)), upper)


def test_1_bit_images_are_black_and_white() -> None:
    white = [[[255] * 3, [0] * 3, [255] * 3]]
    np.testing.assert_array_equal(decode_image(build_png(3, 1, 1, 0, b"\0\xa0")), white)
    # Photometric interpretation 0: white is zero.
    np.testing.assert_array_equal(decode_image(build_tiff(3, 1, [1], 0, b"\x40")), white)


def test_alpha_is_dropped_and_colours_are_kept_as_stored() -> None:
    pixels = np.array([[[200, 100, 50, 0], [1, 2, 3, 255], [9, 8, 7, 128]]], np.uint8)
    contents = [
        build_png(3, 1, 8, 6, b"\0" + pixels.tobytes()),
        encode(Image.fromarray(pixels), "WEBP", lossless=True, exact=True),
        build_tiff(3, 1, [8] * 4, 2, pixels.tobytes(), TiffOptions(extra_tags=[(338, 3, [2])])),
    ]
    for content in contents:
        np.testing.assert_array_equal(decode_image(content), pixels[..., :3])
    grey = build_png(2, 1, 8, 4, b"\0" + bytes([200, 0, 7, 255]))
    np.testing.assert_array_equal(decode_image(grey), [[[200] * 3, [7] * 3]])


def test_premultiplied_alpha_is_divided_out() -> None:
    content = build_tiff(2, 1, [8, 8], 1, bytes([50, 128, 200, 255]), TiffOptions(extra_tags=[(338, 3, [1])]))
    np.testing.assert_array_equal(decode_image(content), [[[99] * 3, [200] * 3]])  # 50 * 255 / 128 = 99.6


# pytest resets the warning filter of segray.data.image_files.
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("alphas", [b"\0", b"\x80\x00\x40", b"\xff\x00"])
def test_a_palette_with_transparency_decodes_to_the_palette_colours(alphas: bytes) -> None:
    colours = bytes([200, 100, 50, 0, 255, 0, 1, 2, 3])
    extra = build_chunk(b"PLTE", colours) + build_chunk(b"tRNS", alphas)
    content = build_png(4, 1, 8, 3, b"\0\0\1\2\1", extra)
    np.testing.assert_array_equal(decode_image(content), [[[200, 100, 50], [0, 255, 0], [1, 2, 3], [0, 255, 0]]])
    np.testing.assert_array_equal(decode_mask(content), [[0, 1, 2, 1]])


INKS = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255], [51, 0, 204, 102]]], np.uint8)

PRINTED = [[[255, 255, 255], [0, 255, 255], [255, 0, 0], [0, 0, 0], [122, 153, 31]]]  # (255 - ink)(255 - black) / 255


def test_cmyk_is_converted_to_rgb() -> None:
    np.testing.assert_allclose(decode_image(build_tiff(5, 1, [8] * 4, 5, INKS.tobytes())), PRINTED, atol=1)


def test_a_cmyk_jpeg_is_inverted_as_adobe_writes_it() -> None:
    blocks = INKS.repeat(8, 0).repeat(8, 1)
    content = encode(Image.fromarray(blocks, "CMYK"), "JPEG", quality=100)
    assert b"Adobe" in content
    np.testing.assert_allclose(decode_image(content)[4, 4::8], PRINTED[0], atol=3)


def test_a_lab_tiff_is_converted_to_rgb() -> None:
    """The reference is the CIE 1976 formula with white point D50, and the published matrix to linear sRGB."""
    levels, a, b = np.array([97, 168, 127, 246, 130]), np.array([14, 18, -5, 0, 0]), np.array([14, 18, -22, 1, 0])
    f_y = (levels / 2.55 + 16) / 116
    xyz = np.stack([f_y + a / 500, f_y, f_y - b / 200]) ** 3 * [[0.96422], [1], [0.82521]]  # No value is near black.
    to_rgb = [[3.13386, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]]
    expected = 255 * (1.055 * np.maximum(to_rgb @ xyz, 0.0031) ** (1 / 2.4) - 0.055)
    stored = np.stack([levels, a, b], -1).astype(np.int16).astype(np.uint8).tobytes()
    np.testing.assert_allclose(decode_image(build_tiff(5, 1, [8] * 3, 8, stored))[0], expected.T, atol=2)


def test_a_ycbcr_tiff_is_converted_to_rgb() -> None:
    stored = bytes([76, 85, 255, 150, 44, 21, 29, 255, 107, 128, 128, 128])
    decoded = decode_image(build_tiff(4, 1, [8] * 3, 6, stored))
    np.testing.assert_allclose(decoded, [[[254, 0, 0], [0, 255, 1], [0, 0, 254], [128] * 3]], atol=2)


@pytest.mark.parametrize(
    ("bits", "sample_format", "message"),
    [
        ([32], 3, "^floating-point pixels; convert"),
        ([64], 3, "^TIFF: its channels, bit depth"),
        ([32], 1, "^32-bit or signed pixels; convert"),
        ([32], 2, "^32-bit or signed pixels; convert"),
        ([16], 2, "^32-bit or signed pixels; convert"),
        ([8] * 8, 1, "^TIFF: its channels, bit depth .*samples per pixel"),
    ],
)
def test_pixel_types_without_a_defined_brightness_are_unsupported(
    bits: list[int], sample_format: int, message: str
) -> None:
    pixels = bytes(4 * sum(bits) // 8)
    content = build_tiff(2, 2, bits, 1, pixels, TiffOptions(extra_tags=[(339, 3, [sample_format])]))
    with pytest.raises(ImageFault, match=message) as caught:
        decode_image(content)
    assert caught.value.kind == FaultKind.UNSUPPORTED


def test_a_32_bit_mask_may_hold_16_bit_values() -> None:
    values = np.array([[0, 300], [7, 65_535]], np.int32)
    np.testing.assert_array_equal(decode_mask(encode(Image.fromarray(values), "TIFF")), values)
    with pytest.raises(ImageFault, match="expected values 0 to 65535, got 0 to 65536"):
        decode_mask(encode(Image.fromarray(values + (values == 65_535)), "TIFF"))


def test_exif_orientation_is_applied_to_image_and_mask() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Viewers rotate it by 90 degrees clockwise.
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(RGB), exif=exif)), np.rot90(RGB, -1))
    mask = RGB[..., 0]
    np.testing.assert_array_equal(decode_mask(encode(Image.fromarray(mask), exif=exif)), np.rot90(mask, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_applied_in_every_format_with_exif(file_format: str, orientation: int) -> None:
    corners = np.zeros((16, 32), np.uint8)
    corners[:8, :8], corners[:8, -8:], corners[-8:, :8] = 255, 170, 85
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = [
        corners,
        corners[:, ::-1],
        corners[::-1, ::-1],
        corners[::-1],
        corners.T,
        np.rot90(corners, -1),
        corners[::-1, ::-1].T,
        np.rot90(corners),
    ][orientation - 1]
    decoded = decode_image(encode(Image.fromarray(corners).convert("RGB"), file_format, exif=exif))
    np.testing.assert_allclose(decoded[..., 1], shown, atol=8)
    turned = swaps_sides(encode(Image.fromarray(corners).convert("RGB"), file_format, exif=exif))
    assert turned == (decoded.shape[:2] != corners.shape)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_orientation_is_applied_to_every_pixel_mode(mode: str) -> None:
    grey = Image.fromarray(RGB[..., 0])
    image = Image.fromarray(RGB[..., 0].astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, straight = encode(image, exif=exif), encode(image)
    np.testing.assert_array_equal(decode_image(turned), np.rot90(decode_image(straight), -1))
    if mode in ("1", "L", "P", "I;16"):
        np.testing.assert_array_equal(decode_mask(turned), np.rot90(decode_mask(straight), -1))


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "WEBP", "TIFF"])
def test_the_first_of_several_frames_is_decoded(file_format: str) -> None:
    grey = Image.fromarray(RGB[..., 0]).convert("RGB" if file_format == "WEBP" else "L")
    options = {"lossless": True} if file_format == "WEBP" else {}
    decoded, note = decode_image_with_note(encode_frames(grey, file_format, **options))
    np.testing.assert_array_equal(decoded, np.asarray(grey.convert("RGB")))
    assert note == "first of 3 frames"
    assert decode_image_with_note(encode(grey, file_format, **options))[1] is None


def test_pages_are_counted_up_to_a_limit() -> None:
    page = build_tiff(1, 1, [8], 1, b"\x07")
    length = len(page) - 8
    pages = [page[8:-5] + struct.pack("<I", 8 + length * number) + b"\x07" for number in range(1, 1100)]
    decoded, note = decode_image_with_note(page[:8] + b"".join(pages) + page[8:])
    np.testing.assert_array_equal(decoded, [[[7, 7, 7]]])
    assert note == "first of more than 1000 frames"


def test_the_frames_of_a_large_gif_are_not_counted() -> None:
    grey = Image.fromarray(RGB[..., 0])
    animated, single = encode_frames(grey, "GIF"), encode(grey, "GIF")
    comments = b"\x21\xfe" + b"\xff" + 255 * b"." + b"\0"
    large = [gif[:-1] + comments * 32_000 + gif[-1:] for gif in (animated, single)]
    assert [decode_image_with_note(gif)[1] for gif in large] == ["first of several frames", None]


def test_masks_decode_to_their_raw_values() -> None:
    values = np.array([[0, 1, 255], [7, 7, 3]], np.uint8)
    np.testing.assert_array_equal(decode_mask(encode(Image.fromarray(values))), values)
    palette = Image.fromarray(values)
    palette.putpalette(list(range(255, -1, -1)) * 3)
    assert palette.mode == "P"
    np.testing.assert_array_equal(decode_mask(encode(palette)), values)
    wide = values.astype(np.uint16) * 200
    np.testing.assert_array_equal(decode_mask(encode(Image.fromarray(wide))), wide)


@pytest.mark.parametrize(
    ("image", "remedy"),
    [
        (
            Image.fromarray(RGB),
            "RGB; replace each colour by its class value, and save the mask as greyscale or palette PNG",
        ),
        (Image.fromarray(RGB[..., 0]).convert("RGB"), "RGB; its channels are equal: save only the first one"),
        (Image.fromarray(RGB[..., 0]).convert("LA"), "LA; its channels are equal: save only the first one"),
        (Image.fromarray(RGB[..., 0].astype(np.float32)), "F; save the mask as 8-bit or 16-bit greyscale PNG"),
    ],
)
def test_a_mask_with_several_channels_is_rejected(image: Image.Image, remedy: str) -> None:
    with pytest.raises(ImageFault, match=f"expected one channel of class values, got {remedy}") as caught:
        decode_mask(encode(image, "TIFF"))
    assert caught.value.kind == FaultKind.MASK_MISMATCH


@pytest.mark.parametrize(("num_classes", "dtype"), [(3, np.uint8), (300, np.uint16)])
def test_an_encoded_mask_png_holds_the_same_values(num_classes: int, dtype: type) -> None:
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
def test_mask_resizing_equals_nearest_exact_of_torch(size: tuple[int, int]) -> None:
    mask = np.random.default_rng(1).integers(0, 256, (31, 41), np.uint8)
    witness = functional.interpolate(torch.from_numpy(mask)[None, None], size=size, mode="nearest-exact")
    np.testing.assert_array_equal(resize_mask(mask, size), witness[0, 0].numpy())


def test_resizing_keeps_image_and_mask_aligned() -> None:
    mask = np.zeros((90, 120), np.uint8)
    mask[30:60, 40:80] = 1
    image = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    small_image, small_mask = resize_image(image, (30, 40)), resize_mask(mask, (30, 40))
    np.testing.assert_array_equal(small_image[..., 0] > 127, small_mask == 1)


def draw_waves(height: int, width: int) -> Image.Image:
    """Draw a smooth pattern in three colours, similar to a photograph."""
    rows, columns = np.mgrid[:height, :width] / 60
    waves = [np.sin(rows + phase) * np.cos(columns - phase) for phase in (0, 1, 2)]
    return Image.fromarray((127 + 120 * np.stack(waves, -1)).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_at_twice_the_needed_size_with_almost_equal_pixels(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(draw_waves(800, 1000), "JPEG", quality=90, exif=exif)
    whole = decode_image(content)
    reduced, size, note = decode_image_reduced(content, 10**6, (64, 96))
    assert (size, note) == (whole.shape[:2], None)
    assert sorted(reduced.shape[:2]) == [200, 250]  # 1/8 would be shorter than 192 pixels.
    difference = resize_image(reduced, (64, 96)).astype(int) - resize_image(whole, (64, 96))
    assert np.abs(difference).mean() < 0.3
    assert np.abs(difference).max() <= 2
    # The limit applies to the full size, and is checked before decoding.
    with pytest.raises(ImageFault, match="1000x800 pixels, more than the limit"):
        decode_image_reduced(content, 800 * 1000 - 1, (64, 96))


@pytest.mark.parametrize("file_format", ["TIFF", "PNG", "WEBP"])
def test_formats_that_are_not_reduced_report_their_rotated_size(file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(draw_waves(300, 400), file_format, exif=exif)
    pixels, size, _ = decode_image_reduced(content, 10**6, (64, 96))
    assert pixels.shape[:2] == size == decode_image(content).shape[:2] == (400, 300)


@pytest.mark.parametrize(("file_format", "height"), [("PNG", 800), ("JPEG", 180), ("JPEG", 801)])
def test_only_large_jpegs_with_divisible_sides_are_reduced(file_format: str, height: int) -> None:
    content = encode(draw_waves(height, 1000), file_format)
    reduced, size, _ = decode_image_reduced(content, 10**6, (64, 96))
    assert size == (height, 1000)
    np.testing.assert_array_equal(reduced, decode_image(content))
