"""Mutated PNG files: chunks with other headers, lengths, orders and data, and nearly always correct checksums."""

import struct
import zlib
from random import Random

from tests.data.fuzzing.damage import damage_bytes, draw_number, flip_bit, replace_number
from tests.data.fuzzing.tiff import mutate_tiff

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NAMES = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"tEXt", b"zTXt")
_MORE_NAMES = (b"iTXt", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"sBIT", b"bKGD", b"CgBI", b"\0\0\0\0", b"zzzz", b"ABCD")
_HEADER_FIELDS = ((0, 4), (4, 4), (8, 1), (9, 1), (10, 1), (11, 1), (12, 1))  # Offset and bytes, in IHDR.
_Chunks = list[tuple[bytes, bytes]]


def mutate_png(content: bytes, rng: Random) -> bytes:
    """Apply one to three changes to the chunks of a PNG file."""
    chunks = _parse(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not chunks:
            break
        at = rng.randrange(len(chunks))
        match rng.randrange(9):
            case 0 | 1:
                chunks[0] = (chunks[0][0], _change_header(chunks[0][1], rng))
            case 2:
                chunks[at] = (rng.choice(_NAMES + _MORE_NAMES), chunks[at][1])
            case 3:
                del chunks[at]
            case 4:
                chunks.insert(rng.randrange(len(chunks) + 1), chunks[at])
            case 5:
                chunks.insert(1, _make_chunk(rng))
            case 6 | 7:
                chunks = _change_pixels(chunks, rng)
            case _:
                chunks[at] = (chunks[at][0], _change_data(*chunks[at], rng))
    return _join(chunks, rng)


def _parse(content: bytes) -> _Chunks:
    chunks, at = [], len(_SIGNATURE)
    while at + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        chunks.append((name, content[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def _join(chunks: _Chunks, rng: Random) -> bytes:
    """Return a file of the chunks; one in sixteen files has a wrong length or checksum."""
    wrong = rng.randrange(len(chunks)) if chunks and rng.randrange(16) == 0 else None
    parts = [_SIGNATURE]
    for number, (name, data) in enumerate(chunks):
        length, checksum = len(data), zlib.crc32(name + data)
        if number == wrong:
            length, checksum = rng.choice(((draw_number(rng, 32, length), checksum), (length, draw_number(rng, 32))))
        parts += [struct.pack(">I", length), name, data, struct.pack(">I", checksum)]
    return b"".join(parts)


def _change_header(header: bytes, rng: Random) -> bytes:
    at, num_bytes = rng.choice(_HEADER_FIELDS)
    if num_bytes == 1 and rng.randrange(4):  # Valid values, in combinations that need not be.
        return header[:at] + bytes([rng.choice((0, 1, 2, 3, 4, 6, 8, 16))]) + header[at + 1 :]
    return replace_number(header, at, num_bytes, "big", rng)


def _change_data(name: bytes, data: bytes, rng: Random) -> bytes:
    if name == b"eXIf":
        return mutate_tiff(data, rng)
    return rng.choice((damage_bytes, flip_bit))(data, rng)


def _change_pixels(chunks: _Chunks, rng: Random) -> _Chunks:
    """Change the filters and pixels below the compression, and distribute the data over other chunks."""
    try:
        rows = zlib.decompress(b"".join(data for name, data in chunks if name == b"IDAT"))
    except zlib.error:
        return chunks
    match rng.randrange(4):
        case 0:
            rows = damage_bytes(rows, rng)
        case 1:
            rows = rows[: rng.randrange(len(rows) + 1)]
        case 2:
            rows += bytes(rng.choice((1, 1000, 20_000_000)))
        case _:
            pass
    data = zlib.compress(rows, rng.choice((0, 1, 9)))
    step = rng.choice((1, 7, 100, len(data)))
    pieces = [(b"IDAT", data[at : at + step]) for at in range(0, min(len(data), 2000 * step), step)]
    others = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
    return [*others[:-1], *pieces, *others[-1:]]


def _make_chunk(rng: Random) -> tuple[bytes, bytes]:
    """Return a chunk with text, a colour profile, a palette, frames or EXIF data, some of them excessive."""
    size = rng.choice((0, 1, 10, 300, 1_000_000, 30_000_000))
    packed = zlib.compress(bytes(size), 1)
    match rng.randrange(8):
        case 0:
            return b"zTXt", b"Raw profile type exif\0\0" + packed
        case 1:
            return b"iTXt", rng.choice((b"Comment", b"XML:com.adobe.xmp")) + b"\0\1\0\0\0" + packed
        case 2:
            return b"iCCP", b"profile\0\0" + packed
        case 3:
            return b"PLTE", rng.randbytes(rng.choice((0, 3, 4, 768, 771, 3000)))
        case 4:
            return b"tRNS", rng.randbytes(rng.choice((0, 1, 2, 6, 16, 300)))
        case 5:
            return b"acTL", struct.pack(">II", draw_number(rng, 32), draw_number(rng, 32))
        case 6:
            numbers = [draw_number(rng, 32) for _ in range(5)]
            return b"fcTL", struct.pack(">IIIIIHHBB", *numbers, 1, 10, rng.randrange(4), rng.randrange(3))
        case _:
            xmp = b'<x tiff:Orientation="%d"/>' % rng.randrange(12)
            return b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
