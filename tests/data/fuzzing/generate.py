"""Make the mutated file of a seed and an index."""

from collections.abc import Callable
from random import Random

from tests.data.fuzzing.damage import damage_bytes, splice
from tests.data.fuzzing.jpeg import mutate_jpeg
from tests.data.fuzzing.others import mutate_bmp, mutate_gif, mutate_webp
from tests.data.fuzzing.png import mutate_png
from tests.data.fuzzing.seeds import build_seeds
from tests.data.fuzzing.tiff import mutate_tiff

_MUTATE: dict[str, Callable[[bytes, Random], bytes]] = {
    "png": mutate_png,
    "jpeg": mutate_jpeg,
    "tiff": mutate_tiff,
    "webp": mutate_webp,
    "gif": mutate_gif,
    "bmp": mutate_bmp,
}


def generate_file(seed: int, index: int) -> tuple[str, bytes]:
    """Return the format and the content of one mutated file; it depends only on the arguments and Pillow's version.

    Three of four files are changed by a function that knows the format, the others by random damage. Some of them are
    also spliced with another file, or damaged after the change.
    """
    rng = Random(f"{seed}/{index}")
    seeds = build_seeds()
    name = rng.choice(tuple(seeds))
    content = rng.choice(seeds[name])
    match rng.randrange(16):
        case 0 | 1 | 2:
            content = damage_bytes(content, rng)
        case 3:
            content = splice(content, rng.choice(seeds[rng.choice(tuple(seeds))]), rng)
        case 4 | 5:
            content = damage_bytes(_MUTATE[name](content, rng), rng)
        case 6:
            content = splice(_MUTATE[name](content, rng), _MUTATE[name](rng.choice(seeds[name]), rng), rng)
        case _:
            content = _MUTATE[name](content, rng)
    return name, content
