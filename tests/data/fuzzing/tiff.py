"""Mutated TIFF files and EXIF data: directories with other tags, types, counts, offsets and successors."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.data.fuzzing.damage import draw_number

# Dimensions, bits, compression, photometric, fill order, strips, orientation, samples, predictor, tiles and so on.
_TAGS = (254, 255, 256, 257, 258, 259, 262, 266, 270, 273, 274, 277, 278, 279, 284, 292, 297, 317, 320, 322, 323, 324)
_MORE_TAGS = (325, 330, 332, 338, 339, 347, 512, 513, 514, 529, 530, 531, 532, 700, 33723, 34377, 34665, 34675, 34853)
_COMPRESSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34676, 34677, 34887, 34925, 50000, 50001)
_SMALL = {258: (1, 2, 4, 8, 12, 16, 32, 64), 262: range(11), 266: range(4), 274: range(12), 277: range(7)}
_SMALL |= {284: range(4), 317: range(5), 338: range(4), 339: range(7), 259: _COMPRESSIONS}
_MAX_PAGES = 50


@dataclass(frozen=True)
class _Layout:
    """How numbers are stored: byte order, and the sizes of a classic or a BigTIFF file."""

    order: str
    is_big: bool

    @property
    def entry(self) -> struct.Struct:
        return struct.Struct(self.order + ("HHQQ" if self.is_big else "HHII"))

    @property
    def count(self) -> struct.Struct:
        return struct.Struct(self.order + ("Q" if self.is_big else "H"))

    @property
    def offset(self) -> struct.Struct:
        return struct.Struct(self.order + ("Q" if self.is_big else "I"))


_Entry = tuple[int, int, int, int]  # Tag, type, count, value or offset.


def mutate_tiff(content: bytes, rng: Random) -> bytes:
    """Apply one to four changes to the first directory of a TIFF file, and write it back in place or at the end."""
    layout = _Layout(">" if content[:2] == b"MM" else "<", content[2:3] == b"+" or content[3:4] == b"+")
    try:
        (at,) = layout.offset.unpack_from(content, 8 if layout.is_big else 4)
        (num_entries,) = layout.count.unpack_from(content, at)
        first_at, size = at + layout.count.size, layout.entry.size
        entries: list[_Entry] = [
            layout.entry.unpack_from(content, first_at + size * number) for number in range(min(num_entries, 100))
        ]
        (next_at,) = layout.offset.unpack_from(content, first_at + size * num_entries)
    except struct.error:
        return content[: rng.randrange(len(content) + 1)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(_CHANGES)(entries, len(content), layout, rng)
    match rng.randrange(8):
        case 0:
            next_at = rng.choice((at, 0, 8, draw_number(rng, 32, len(content))))
        case 1:
            return _append_pages(content, entries, layout, rng)
    count = draw_number(rng, 16, len(entries)) if rng.randrange(16) == 0 else len(entries)
    directory = _pack(entries, count, next_at, layout)
    if len(entries) == num_entries and rng.randrange(4):
        return content[:at] + directory + content[at + len(directory) :]
    return _point_to(content, len(content), layout) + directory


def _pack(entries: list[_Entry], count: int, next_at: int, layout: _Layout) -> bytes:
    limit = 8 * layout.offset.size
    packed = [layout.entry.pack(tag, kind, number % 2**limit, value % 2**limit) for tag, kind, number, value in entries]
    return layout.count.pack(count) + b"".join(packed) + layout.offset.pack(next_at % 2**limit)


def _point_to(content: bytes, at: int, layout: _Layout) -> bytes:
    """Return the file with the offset of its first directory replaced."""
    pointer_at = 8 if layout.is_big else 4
    return content[:pointer_at] + layout.offset.pack(at) + content[pointer_at + layout.offset.size :]


def _append_pages(content: bytes, entries: list[_Entry], layout: _Layout, rng: Random) -> bytes:
    """Repeat the directory many times; the last one points anywhere."""
    size = len(_pack(entries, 0, 0, layout))
    num_pages, start = rng.choice((2, 10, _MAX_PAGES)), len(content)
    pages = [_pack(entries, len(entries), start + size * (page + 1), layout) for page in range(num_pages)]
    pages[-1] = _pack(entries, len(entries), rng.choice((0, start, draw_number(rng, 32))), layout)
    return _point_to(content, start, layout) + b"".join(pages)


def _change_value(entries: list[_Entry], length: int, layout: _Layout, rng: Random) -> None:
    at = rng.randrange(len(entries) or 1)
    for tag, kind, count, value in entries[at : at + 1]:
        if tag in _SMALL and rng.randrange(4):
            value = rng.choice(tuple(_SMALL[tag]))
            if kind == 3 and layout.order == ">":  # A short is at the start of the field.
                value <<= 8 * layout.offset.size - 16
        else:
            value = draw_number(rng, 32, rng.choice((value, length)))
        entries[at] = (tag, kind, count, value)


def _change_count(entries: list[_Entry], length: int, layout: _Layout, rng: Random) -> None:
    at = rng.randrange(len(entries) or 1)
    for tag, kind, count, value in entries[at : at + 1]:
        entries[at] = (tag, kind, draw_number(rng, 32, rng.choice((count, length))), value)


def _change_kind(entries: list[_Entry], length: int, layout: _Layout, rng: Random) -> None:
    at = rng.randrange(len(entries) or 1)
    for tag, kind, count, value in entries[at : at + 1]:
        entries[at] = (tag, rng.choice((*range(20), draw_number(rng, 16, kind))), count, value)


def _change_tag(entries: list[_Entry], length: int, layout: _Layout, rng: Random) -> None:
    at = rng.randrange(len(entries) or 1)
    for _, kind, count, value in entries[at : at + 1]:
        entries[at] = (rng.choice(_TAGS + _MORE_TAGS), kind, count, value)


def _add_tag(entries: list[_Entry], length: int, layout: _Layout, rng: Random) -> None:
    tag, kind = rng.choice(_TAGS + _MORE_TAGS), rng.choice((1, 2, 3, 4, 5, 7, 12, 13))
    entries.append((tag, kind, rng.choice((1, 2, draw_number(rng, 32, length))), draw_number(rng, 32, length)))


def _remove_tag(entries: list[_Entry], length: int, layout: _Layout, rng: Random) -> None:
    if entries:
        del entries[rng.randrange(len(entries))]


def _overlap_tags(entries: list[_Entry], length: int, layout: _Layout, rng: Random) -> None:
    """Add many tags that each have the whole file as their data."""
    first = rng.randrange(40_000, 60_000)
    entries += [(tag, 7, length, 0) for tag in range(first, first + rng.choice((5, 100)))]


_CHANGES: tuple[Callable[[list[_Entry], int, _Layout, Random], None], ...] = (
    _change_value,
    _change_value,
    _change_value,
    _change_count,
    _change_kind,
    _change_tag,
    _add_tag,
    _remove_tag,
    _overlap_tags,
)
