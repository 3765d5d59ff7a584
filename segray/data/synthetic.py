"""Synthetic labelled images in the Oxford-IIIT Pet layout: drawn shapes on noisy backgrounds."""

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from segray.data.images import encode_png
from segray.storage import join_uri, write_bytes

SHAPES = ("disc", "square", "triangle", "star")
_FOREGROUND, _BACKGROUND, _BORDER = 1, 2, 3  # Trimap values of Oxford-IIIT Pet.
_BORDER_PX = 5


def draw_shape(seed: int, size: int = 128) -> tuple[Image.Image, Image.Image]:
    """Draw an image of one shape and its trimap.

    Args:
        seed: Determines the whole image; the shape is ``SHAPES[seed % 4]``.
        size: Height and width in pixels.

    Returns:
        RGB image, and greyscale trimap with values 1 (shape), 2 (background) and 3 (border), both ``size`` x ``size``.
    """
    rng = np.random.default_rng(seed)
    outline = _draw_outline(SHAPES[seed % len(SHAPES)], size, rng)
    inside = np.asarray(outline) > 0
    grown = np.asarray(outline.filter(ImageFilter.MaxFilter(_BORDER_PX))) > 0
    shrunk = np.asarray(outline.filter(ImageFilter.MinFilter(_BORDER_PX))) > 0
    trimap = np.where(shrunk, _FOREGROUND, np.where(grown, _BORDER, _BACKGROUND)).astype(np.uint8)
    hue = rng.uniform(0, 1)
    pixels = np.where(inside[..., None], _colour(hue, 200), _colour(hue + 0.5, 110)).astype(np.float64)
    waves = np.sin(np.add.outer(np.arange(size), np.arange(size)) * rng.uniform(0.05, 0.3))
    pixels += 18 * waves[..., None] + rng.normal(0, 14, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(trimap)


def _draw_outline(shape: str, size: int, rng: np.random.Generator) -> Image.Image:
    radius = size * rng.uniform(0.2, 0.33)
    x, y = rng.uniform(radius, size - radius, 2)
    outline = Image.new("L", (size, size))
    draw = ImageDraw.Draw(outline)
    if shape == "disc":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        return outline
    num_corners = {"square": 4, "triangle": 3, "star": 10}[shape]
    turn = rng.uniform(0, 2 * math.pi)
    corners = []
    for corner in range(num_corners):
        reach = radius * (0.45 if shape == "star" and corner % 2 else 1.0)
        angle = turn + 2 * math.pi * corner / num_corners
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    draw.polygon(corners, fill=255)
    return outline


def _colour(hue: float, value: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    rgb = Image.new("HSV", (1, 1), (int(hue * 255) % 256, 150, value)).convert("RGB").getpixel((0, 0))
    return np.array(rgb, np.float64)


def save_shapes(root_uri: str, num_train: int, num_test: int, size: int = 128) -> None:
    """Write a data set: ``images/*.jpg``, ``annotations/trimaps/*.png``, ``annotations/trainval.txt`` and ``test.txt``.

    Args:
        root_uri: Folder to write to.
        num_train: Number of images in ``trainval.txt``.
        num_test: Number of images in ``test.txt``.
        size: Height and width of the images, in pixels.

    Raises:
        StorageError: The store denied access, or failed.
    """
    names = [f"{SHAPES[index % len(SHAPES)]}_{index}" for index in range(num_train + num_test)]
    for index, name in enumerate(names):
        image, trimap = draw_shape(index, size)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=92)
        write_bytes(join_uri(root_uri, "images", f"{name}.jpg"), buffer.getvalue())
        write_bytes(join_uri(root_uri, "annotations", "trimaps", f"{name}.png"), encode_png(trimap))
    for split, chosen in (("trainval", names[:num_train]), ("test", names[num_train:])):
        # The columns of the lists of Oxford-IIIT Pet: name, class, species, breed.
        lines = [f"{name} {SHAPES.index(name.split('_')[0]) + 1} 1 1\n" for name in chosen]
        write_bytes(join_uri(root_uri, "annotations", f"{split}.txt"), "".join(lines).encode())
