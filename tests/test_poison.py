"""Damaged, truncated and unusual files: each gives its expected row. ``tests/data/fuzzing`` has random damage."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from segray.config import IMAGE_EXTENSIONS
from segray.data.images import decode_image, decode_image_with_note
from segray.errors import FaultKind, ImageFault
from tests.poison import Poison, build_poison, build_samples

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")  # pytest resets the filter of segray.data.images

POISON = build_poison()
SAMPLES = build_samples()
FEW_PX = 1_000_000


def attempt(decode: Callable[..., npt.NDArray[Any]], content: bytes) -> npt.NDArray[Any] | FaultKind:
    """Decode a file; return the array, or the kind of the fault."""
    try:
        return decode(content, FEW_PX)
    except ImageFault as fault:
        return fault.kind


def test_names_are_unique_with_listed_extensions_and_files_are_reproducible() -> None:
    names = [poison.name for poison in POISON]
    assert len(set(names)) == len(names) >= 30
    assert {name.rsplit(".")[-1] for name in names} <= set(IMAGE_EXTENSIONS)
    assert build_poison() == POISON


@pytest.mark.parametrize("poison", POISON, ids=lambda poison: poison.name)
def test_each_file_gives_its_expected_row(poison: Poison) -> None:
    if poison.kind is None:
        image, note = decode_image_with_note(poison.content)
        assert image.shape[:2] == poison.size
        assert image.shape[2:] == (3,)
        assert note == poison.note
        return
    with pytest.raises(ImageFault, match=poison.message) as caught:
        decode_image_with_note(poison.content)
    assert caught.value.kind == poison.kind
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_truncated_file_is_reported_as_truncated_or_decoded_completely(name: str) -> None:
    """At every length; a file that only lacks data after its pixels is decoded completely."""
    content = SAMPLES[name]
    whole = decode_image(content)
    cut = [attempt(decode_image, content[:length]) for length in range(1, len(content))]
    for length, image in enumerate(cut, 1):
        if not isinstance(image, FaultKind):
            np.testing.assert_array_equal(image, whole)
        elif length >= 12:  # enough bytes to detect the format
            assert image == FaultKind.TRUNCATED, f"cut at {length}"
    assert any(isinstance(image, FaultKind) for image in cut[12:])


@pytest.mark.parametrize("name", [name for name in SAMPLES if name.startswith("png")])
def test_a_png_with_a_flipped_bit_is_a_fault_or_decoded_correctly(name: str) -> None:
    """PNG has checksums of all its data; other formats do not."""
    content = SAMPLES[name]
    whole = decode_image(content)
    for at, bit in itertools.product(range(len(content)), (0x01, 0x80)):
        broken = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
        image = attempt(decode_image, broken)
        if not isinstance(image, FaultKind):
            np.testing.assert_array_equal(image, whole, err_msg=f"bit {bit} of byte {at}")


def test_decoding_prints_nothing_and_takes_little_memory() -> None:
    """Runs in a separate process, because C libraries print directly and pytest changes the warning filters."""
    script = """
import contextlib, pathlib, re
from segray.errors import ImageFault
from segray.data.images import decode_image_with_note
from tests.poison import build_poison

def read_peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text()).group(1)) // 1024

contents = [poison.content for poison in build_poison()]
before = read_peak()
for content in contents:
    with contextlib.suppress(ImageFault):
        decode_image_with_note(content)
print(read_peak() - before)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert int(done.stdout) < 400  # MiB: a greyscale image of 100 million pixels and its copies
