"""Mutated BMP, GIF and WebP files: headers, blocks and chunks with other sizes, dimensions, orders and data."""

import struct
from random import Random

from tests.data.fuzzing.damage import damage_bytes, draw_number, flip_bit, replace_number
from tests.data.fuzzing.tiff import mutate_tiff

# Offset and bytes of the fields of a BMP header: file size, offset of the pixels, header size, dimensions, planes,
# bits, compression, size of the pixels, colours, masks.
_BMP_FIELDS = (
    *((2, 4), (10, 4), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2), (30, 4), (34, 4), (46, 4), (50, 4)),
    *((54, 4), (58, 4), (62, 4), (66, 4)),
)
_BMP_VALUES = {14: (12, 16, 40, 52, 56, 64, 108, 124), 28: (1, 2, 4, 8, 16, 24, 32), 30: range(7)}
_WEBP_NAMES = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"EXIF", b"XMP ", b"ICCP", b"abcd")
_SIDE_PX = 24  # Near the sides of the valid files.
_NUM_REPEATS = (1, 2, 10, 1000)
_Chunks = list[tuple[bytes, bytes]]


def mutate_bmp(content: bytes, rng: Random) -> bytes:
    """Change one to three fields of a BMP header, or its pixels."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.randrange(5) == 0:
            content = content[:54] + damage_bytes(content[54:], rng)
            continue
        at, num_bytes = rng.choice(_BMP_FIELDS)
        if at in _BMP_VALUES and rng.randrange(4):
            value = rng.choice(tuple(_BMP_VALUES[at])).to_bytes(num_bytes, "little")
            content = content[:at] + value + content[at + num_bytes :]
        else:
            content = replace_number(content, at, num_bytes, "little", rng)
    return content


def mutate_gif(content: bytes, rng: Random) -> bytes:
    """Change the screen, the colour tables, or the blocks of a GIF file, one to three times."""
    table_bytes = 3 << ((content[10] & 7) + 1) if content[10:11] and content[10] & 0x80 else 0
    head, blocks = content[: 13 + table_bytes], _split_gif(content[13 + table_bytes :])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(blocks))
        block = blocks[at]
        match rng.randrange(8):
            case 0:
                head = replace_number(head, *rng.choice(((6, 2), (8, 2), (10, 1), (11, 1))), "little", rng)
            case 1 | 2 if block.startswith(b","):  # Position and size of a frame, its flags, and the code size.
                field = rng.choice(((1, 2), (3, 2), (5, 2), (7, 2), (9, 1), (10, 1)))
                blocks[at] = replace_number(block, *field, "little", rng)
            case 3:
                blocks = blocks[:at] + blocks[at:] * rng.choice(_NUM_REPEATS)
                blocks = blocks[:4000]
            case 4 if len(blocks) > 1:
                del blocks[at]
            case 5:
                blocks.insert(at, b"!" + rng.choice((b"\xf9", b"\xfe", b"\xff", b"\x01")) + _make_sub_blocks(rng))
            case _:
                blocks[at] = rng.choice((damage_bytes, flip_bit))(block, rng)
    return head + b"".join(blocks)


def _split_gif(content: bytes) -> list[bytes]:
    """Return the blocks after the screen: extensions, frames and the trailer; the rest, if broken, as the last one."""
    blocks, at = [], 0
    while content[at : at + 1] in (b"!", b","):
        end = at + 2
        if content[at : at + 1] == b"," and at + 10 <= len(content):
            flags = content[at + 9]
            end = at + 11 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
        while end < len(content) and content[end]:
            end += 1 + content[end]
        blocks.append(content[at : end + 1])
        at = end + 1
    return [*blocks, content[at:]]


def _make_sub_blocks(rng: Random) -> bytes:
    pieces = [rng.randbytes(rng.choice((1, 4, 11, 255))) for _ in range(rng.choice((0, 1, 2, 300)))]
    return b"".join(bytes([len(piece)]) + piece for piece in pieces) + rng.choice((b"\0", b""))


def mutate_webp(content: bytes, rng: Random) -> bytes:
    """Apply one to three changes to the chunks of a WebP file; the total length is corrected in most files."""
    chunks = _split_riff(content[12:])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not chunks:
            break
        at = rng.randrange(len(chunks))
        name, data = chunks[at]
        match rng.randrange(7):
            case 0:
                chunks[at] = (rng.choice(_WEBP_NAMES), data)
            case 1:
                del chunks[at]
            case 2:
                chunks[at:at] = [chunks[at]] * rng.choice(_NUM_REPEATS[:3])
            case 3:
                width, height = (rng.choice((19, 25, draw_number(rng, 24, _SIDE_PX))) for _ in range(2))
                canvas = width.to_bytes(3, "little") + height.to_bytes(3, "little")
                chunks.insert(0, (b"VP8X", bytes([rng.getrandbits(8), 0, 0, 0]) + canvas))
            case _:
                chunks[at] = (name, _change_webp_chunk(name, data, rng))
    body = b"WEBP" + b"".join(
        struct.pack("<4sI", name, len(data) if rng.randrange(40) else draw_number(rng, 32, len(data)))
        + data
        + b"\0" * (len(data) % 2)
        for name, data in chunks
    )
    length = len(body) if rng.randrange(10) else draw_number(rng, 32, len(body))
    return struct.pack("<4sI", b"RIFF", length) + body


def _split_riff(content: bytes) -> _Chunks:
    chunks, at = [], 0
    while at + 8 <= len(content):
        name, length = struct.unpack_from("<4sI", content, at)
        chunks.append((name, content[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return chunks


def _change_webp_chunk(name: bytes, data: bytes, rng: Random) -> bytes:
    match name:
        case b"EXIF":
            return mutate_tiff(data, rng)
        case b"VP8X":  # Flags, and the dimensions of the canvas.
            return replace_number(data, *rng.choice(((0, 1), (4, 3), (7, 3))), "little", rng)
        case b"ANMF":  # Position and dimensions of a frame, duration, flags; then its chunks.
            return replace_number(data, *rng.choice(((0, 3), (3, 3), (6, 3), (9, 3), (12, 3), (15, 1))), "little", rng)
        case b"VP8L" if rng.randrange(2):  # Width and height in 14 bits each.
            sides = draw_number(rng, 14, _SIDE_PX) | draw_number(rng, 14, _SIDE_PX) << 14
            return data[:1] + struct.pack("<I", sides) + data[5:]
        case b"VP8 " if rng.randrange(2):
            return replace_number(data, rng.choice((6, 8)), 2, "little", rng)
    return rng.choice((damage_bytes, flip_bit))(data, rng)
