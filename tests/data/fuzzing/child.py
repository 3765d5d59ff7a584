"""Decode the mutated files of a seed in this process: ``python -m tests.data.fuzzing.child SEED START STOP PATH``.

Each file is decoded as an image, as an image at a reduced size and as a mask, twice: the second time, the C library
fills new memory with other bytes, so pixels that no decoder has written differ. One line of JSON per file is appended
to PATH. A file that crashes this process, or takes too long, has no line; ``run_chunk`` adds it.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from segray.data.classes import ClassMap
from segray.data.images import decode_image_reduced, decode_image_with_note
from segray.data.samples import decode_truth
from segray.errors import FaultKind, ImageFault
from segray.runtime.connect import release_memory
from tests.data.fuzzing.generate import generate_file

MAX_PX = 1_000_000
MAX_CPU_S, MAX_WALL_S = 20, 200  # For one file: all its decodings.
MAX_PEAK_BYTES = 256 * 2**20  # Resident, in addition to before; the largest image takes 4 MB, and its copies.
_MAX_ADDRESS_BYTES = 2 * 2**30  # In addition to before; ends what would take the memory of the machine.
_MAX_MESSAGE_CHARS = 600
_IMAGE_KINDS = {FaultKind.UNREADABLE, FaultKind.TRUNCATED, FaultKind.UNSUPPORTED, FaultKind.TOO_LARGE}
_CLASSES = ClassMap(tuple(map(str, range(255))), tuple(range(255)), (255,))
_FILL_OPTION = -6  # M_PERTURB of glibc's mallopt.
_Decoded = tuple[npt.NDArray[Any], Any]


@dataclass(frozen=True)
class Result:
    """What decoding one mutated file gave.

    Attributes:
        index: Index of the file; with the seed, it makes the file again.
        format: Format of the file before its mutation.
        image: ``ok``, the kind of the fault, or ``finding``.
        mask: The same for the file as a mask.
        finding: What is wrong; empty if nothing is.
        cpu_s: CPU time of all decodings.
        peak_bytes: Largest resident memory, in addition to before.
    """

    index: int
    format: str
    image: str
    mask: str
    finding: str = ""
    cpu_s: float = 0.0
    peak_bytes: int = 0


def check_file(content: bytes) -> tuple[str, str]:
    """Decode a file in all ways; return the outcomes as an image and as a mask.

    Raises:
        AssertionError: An array or a fault is not as documented, or decoding twice gives different ones.
        Exception: Anything else that a decoder raises.
    """
    passes = []
    for fill in (0x55, 0xAA):
        ctypes.CDLL(None).mallopt(_FILL_OPTION, fill)
        passes.append(_decode_all(content))
    assert passes[0] == passes[1], f"not reproducible: {passes[0]} and {passes[1]}"
    image, _, mask = passes[0]
    return image[0], mask[0]


def _decode_all(content: bytes) -> list[tuple[str, object]]:
    sizes: list[tuple[int, ...]] = []

    def decode() -> _Decoded:
        image, note = decode_image_with_note(content, MAX_PX)
        _check_image(image)
        sizes.append(image.shape[:2])
        return image, note

    def decode_reduced() -> _Decoded:
        image, size, note = decode_image_reduced(content, MAX_PX, (8, 8))
        _check_image(image)
        assert not sizes or size == sizes[0], f"full size {size} instead of {sizes[0]}"
        return image, (size, note)

    def decode_as_mask() -> _Decoded:
        mask = decode_truth(content, sizes[0] if sizes else None, _CLASSES, MAX_PX)
        assert mask.ndim == 2, f"mask of shape {mask.shape}"
        assert mask.dtype == np.uint8, f"mask of {mask.dtype}"
        assert 0 < mask.size <= MAX_PX, f"mask of shape {mask.shape}"
        return mask, None

    image_kinds, mask_kinds = _IMAGE_KINDS, {FaultKind.MASK_MISMATCH}
    return [_attempt(decode, image_kinds), _attempt(decode_reduced, image_kinds), _attempt(decode_as_mask, mask_kinds)]


def _check_image(image: npt.NDArray[Any]) -> None:
    assert image.dtype == np.uint8, f"image of {image.dtype}"
    assert image.ndim == 3, f"image of shape {image.shape}"
    assert image.shape[2] == 3, f"image of shape {image.shape}"
    assert 0 < image.shape[0] * image.shape[1] <= MAX_PX, f"image of shape {image.shape}"


def _attempt(decode: Callable[[], _Decoded], kinds: set[FaultKind]) -> tuple[str, object]:
    """Return ``ok`` and what identifies the result, or the kind and the message of the fault."""
    try:
        array, more = decode()
    except ImageFault as fault:
        _check_fault(fault, kinds)
        return str(fault.kind), str(fault)
    return "ok", (array.shape, zlib.crc32(np.ascontiguousarray(array).data), more)


def _check_fault(fault: ImageFault, kinds: set[FaultKind]) -> None:
    message = str(fault)
    assert fault.kind in kinds, f"kind {fault.kind}: {message!r}"
    assert message.isprintable(), f"not one line of printable text: {message!r}"
    assert 0 < len(message) <= _MAX_MESSAGE_CHARS, f"message of {len(message)} characters: {message!r}"


def _read_memory(name: str) -> int:
    """Return a value of this process in bytes: ``VmRSS``, ``VmHWM`` (its peak) or ``VmSize``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def _measure_file(seed: int, index: int) -> Result:
    name, content = generate_file(seed, index)
    release_memory()  # Of earlier files.
    with suppress(OSError):  # Where the peak cannot be reset, it is that of all files so far.
        Path("/proc/self/clear_refs").write_text("5")
    began_bytes, began_s = _read_memory("VmRSS"), time.process_time()
    image, mask, finding = "finding", "finding", ""
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    signal.setitimer(signal.ITIMER_REAL, MAX_WALL_S)
    try:
        image, mask = check_file(content)
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        finding = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    peak_bytes = _read_memory("VmHWM") - began_bytes
    if not finding and peak_bytes > MAX_PEAK_BYTES:
        finding = f"took {peak_bytes / 2**20:.0f} MiB of memory"
    return Result(index, name, image, mask, finding, round(time.process_time() - began_s, 4), peak_bytes)


def main() -> None:
    """Decode the files; what libraries print goes to a file, and is a finding."""
    seed, start, stop = map(int, sys.argv[1:4])
    path = Path(sys.argv[4])
    printed = os.memfd_create("printed")
    limit = _read_memory("VmSize") + _MAX_ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kept = os.dup(2)
    with path.open("a") as results:
        for index in range(start, stop):
            os.dup2(printed, 2)
            result = asdict(_measure_file(seed, index))
            os.dup2(kept, 2)
            if (length := os.fstat(printed).st_size) and not result["finding"]:
                result["finding"] = f"printed {os.pread(printed, min(length, 200), 0).decode(errors='replace')!r}"
            os.ftruncate(printed, 0)
            os.lseek(printed, 0, os.SEEK_SET)
            results.write(json.dumps(result) + "\n")
            results.flush()


if __name__ == "__main__":
    main()
