"""Damage that needs no knowledge of a format, and the values that parsers most often handle wrongly."""

from collections.abc import Callable
from random import Random
from typing import Literal

ByteOrder = Literal["little", "big"]
# Limits of integer types, and the values next to them.
_EDGES = (0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 127, 128, 255, 256, 257, 4095, 32_767, 32_768, 65_535, 65_536)
_WIDE_EDGES = (2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_ORDERS: tuple[ByteOrder, ...] = ("little", "big")
_MAX_BYTES = 200_000  # Repetition must not make files that take long only because of their length.


def draw_number(rng: Random, bits: int, near: int = 0) -> int:
    """Return an unsigned integer of at most ``bits`` bits: near a limit of a type, near a given value, or any."""
    match rng.randrange(4):
        case 0:
            number = rng.choice(_EDGES)
        case 1:
            number = rng.choice(_WIDE_EDGES) - rng.randrange(3)
        case 2:
            number = near + rng.choice((-1, 1)) * rng.choice((1, 2, 3, 4, 8, 16, 100))
        case _:
            number = rng.getrandbits(rng.randint(1, bits))
    return number % (1 << bits)


def replace_number(content: bytes, at: int, num_bytes: int, order: ByteOrder, rng: Random) -> bytes:
    """Replace the unsigned integer at an offset by a drawn one."""
    old = int.from_bytes(content[at : at + num_bytes], order)
    new = draw_number(rng, 8 * num_bytes, old).to_bytes(num_bytes, order)
    return content[:at] + new + content[at + num_bytes :]


def flip_bit(content: bytes, rng: Random) -> bytes:
    """Invert one bit."""
    at = rng.randrange(len(content) or 1)
    return content[:at] + bytes(byte ^ (1 << rng.randrange(8)) for byte in content[at : at + 1]) + content[at + 1 :]


def _overwrite_noise(content: bytes, rng: Random) -> bytes:
    at, noise = rng.randrange(len(content) + 1), rng.randbytes(rng.randint(1, 20))
    return content[:at] + noise + content[at + len(noise) :]


def _overwrite_number(content: bytes, rng: Random) -> bytes:
    at, num_bytes = rng.randrange(len(content) + 1), rng.choice((1, 2, 4))
    return replace_number(content, at, num_bytes, rng.choice(_ORDERS), rng)


def _cut_end(content: bytes, rng: Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _remove_span(content: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + content[at + rng.randint(1, 100) :]


def _insert_noise(content: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.randbytes(rng.randint(1, 100)) + content[at:]


def _repeat_span(content: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    span = content[at : at + rng.randint(1, 200)]
    return (content[:at] + span * rng.choice((1, 2, 10, 500)) + content[at:])[:_MAX_BYTES]


_DAMAGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    flip_bit,
    flip_bit,
    _overwrite_noise,
    _overwrite_number,
    _overwrite_number,
    _cut_end,
    _remove_span,
    _insert_noise,
    _repeat_span,
)


def damage_bytes(content: bytes, rng: Random) -> bytes:
    """Flip bits, overwrite, cut, remove, insert or repeat bytes, one to four times."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(_DAMAGES)(content, rng)
    return content


def splice(content: bytes, other: bytes, rng: Random) -> bytes:
    """Return the beginning of one file followed by the end of another."""
    return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]
