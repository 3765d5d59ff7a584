"""Mutated JPEG files: segments with other lengths, dimensions, tables and components, and files of many scans."""

import struct
from dataclasses import dataclass
from random import Random

from tests.data.fuzzing.damage import damage_bytes, draw_number, flip_bit, replace_number
from tests.data.fuzzing.tiff import mutate_tiff

_SOS, _EXIF_START = 0xDA, b"Exif\0\0"
_BARE_MARKERS = (0x01, *range(0xD0, 0xDA))
_MARKERS = (*range(0xC0, 0xD0), *range(0xD8, 0xF0), 0xFE, 0x01, 0xD0)
_MAX_SCANS = 400


@dataclass(frozen=True)
class _Segment:
    """A marker, its data without the length, and the entropy-coded data that follow."""

    marker: int
    data: bytes
    coded: bytes = b""

    def join(self, length: int | None = None) -> bytes:
        start = bytes([0xFF, self.marker])
        if self.marker in _BARE_MARKERS:
            return start + self.coded
        length = len(self.data) + 2 if length is None else length
        return start + struct.pack(">H", length % 65_536) + self.data + self.coded


def mutate_jpeg(content: bytes, rng: Random) -> bytes:
    """Apply one to three changes to the segments of a JPEG file."""
    segments = _parse(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if len(segments) < 2:
            break
        at = rng.randrange(1, len(segments))
        chosen = segments[at]
        match rng.randrange(9):
            case 0 | 1:
                segments = _change_frame(segments, rng)
            case 2:
                segments[at] = _Segment(rng.choice(_MARKERS), chosen.data, chosen.coded)
            case 3:
                del segments[at]
            case 4:
                segments.insert(rng.randrange(1, len(segments) + 1), chosen)
            case 5:
                segments = _repeat_scans(segments, rng)
            case 6:
                segments[at] = _Segment(chosen.marker, chosen.data, _change_coded(chosen.coded, rng))
            case _:
                segments[at] = _Segment(chosen.marker, _change_data(chosen, rng), chosen.coded)
    wrong = rng.randrange(len(segments)) if segments and rng.randrange(10) == 0 else None
    length = draw_number(rng, 16, 10)
    return b"".join(segment.join(length if number == wrong else None) for number, segment in enumerate(segments))


def _parse(content: bytes) -> list[_Segment]:
    segments, at = [], 0
    while at + 2 <= len(content):
        marker, data = content[at + 1], b""
        at += 2
        if marker not in _BARE_MARKERS and at + 2 <= len(content):
            (length,) = struct.unpack_from(">H", content, at)
            data, at = content[at + 2 : at + length], at + max(2, length)
        end = at
        if marker == _SOS or marker in _BARE_MARKERS:
            end = content.find(b"\xff", at)
            while 0 <= end < len(content) - 1 and (content[end + 1] == 0 or 0xD0 <= content[end + 1] <= 0xD7):
                end = content.find(b"\xff", end + 2)
            end = len(content) if end < 0 else end
        segments.append(_Segment(marker, data, content[at:end]))
        at = end
    return segments


def _change_frame(segments: list[_Segment], rng: Random) -> list[_Segment]:
    """Change the precision, dimensions, number of components, sampling or table of a frame header, or its process."""
    for at, segment in enumerate(segments):
        if 0xC0 <= segment.marker <= 0xCF and segment.marker not in (0xC4, 0xC8, 0xCC):
            data, marker = segment.data, segment.marker
            match rng.randrange(5):
                case 0:
                    marker = rng.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA, 0xCB))
                case 1 | 2:
                    data = replace_number(data, rng.choice((1, 3)), 2, "big", rng)
                case 3:
                    data = replace_number(data, rng.choice((0, 5)), 1, "big", rng)
                case _:
                    data = data[:6] + damage_bytes(data[6:], rng)
            return [*segments[:at], _Segment(marker, data, segment.coded), *segments[at + 1 :]]
    return segments


def _repeat_scans(segments: list[_Segment], rng: Random) -> list[_Segment]:
    """Repeat all scans and tables after the frame header, as a progressive file of excessive length does."""
    scans = [segment for segment in segments if segment.marker in (_SOS, 0xC4)]
    num_repeats = rng.choice((1, 2, _MAX_SCANS // (len(scans) or 1)))
    short = [_Segment(scan.marker, scan.data, scan.coded[: rng.choice((2, 10, 10_000))]) for scan in scans]
    return [*segments[:-1], *(short * num_repeats), segments[-1]]


def _change_coded(coded: bytes, rng: Random) -> bytes:
    if rng.randrange(3):
        return damage_bytes(coded, rng)
    at = rng.randrange(len(coded) + 1)
    return coded[:at] + bytes([0xFF, rng.choice(_MARKERS)]) + coded[at:]


def _change_data(segment: _Segment, rng: Random) -> bytes:
    if segment.marker == 0xE1 and segment.data.startswith(_EXIF_START):
        return _EXIF_START + mutate_tiff(segment.data[len(_EXIF_START) :], rng)
    return rng.choice((damage_bytes, flip_bit))(segment.data, rng)[:65_533]
