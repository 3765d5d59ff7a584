"""Every poison file gives the row that a user would find right, and no way of breaking a file gives anything else."""

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
from segray.data.images import decode_image, decode_image_with_note, decode_mask
from segray.errors import FaultKind, ImageFault
from tests.poison import Poison, build_poison, build_samples

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")  # pytest undoes the filter of segray.data.images

POISON = build_poison()
SAMPLES = build_samples()
FEW_PX = 1_000_000
KINDS = {FaultKind.UNREADABLE, FaultKind.TRUNCATED, FaultKind.UNSUPPORTED, FaultKind.TOO_LARGE}


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Return a file broken in one to four ways: flipped bits, noise, a cut, a gap, an insertion."""
    for _ in range(rng.integers(1, 5)):
        at, length = int(rng.integers(0, len(content) + 1)), int(rng.integers(1, 20))
        noise = rng.bytes(length)
        flipped = bytes(byte ^ (1 << int(rng.integers(8))) for byte in content[at : at + 1])
        content = (
            content[:at] + flipped + content[at + 1 :],
            content[:at] + noise + content[at + length :],
            content[:at],
            content[:at] + content[at + length :],
            content[:at] + noise + content[at:],
        )[rng.choice(5, p=[0.4, 0.2, 0.1, 0.1, 0.2])]
    return content


def attempt(decode: Callable[..., npt.NDArray[Any]], content: bytes) -> npt.NDArray[Any] | FaultKind:
    """Return what decoding gives: an array, or the kind of its fault."""
    try:
        return decode(content, FEW_PX)
    except ImageFault as fault:
        return fault.kind


def test_poison_files_have_names_that_are_listed_once() -> None:
    names = [poison.name for poison in POISON]
    assert len(set(names)) == len(names) >= 30
    assert {name.rsplit(".")[-1] for name in names} <= set(IMAGE_EXTENSIONS)
    assert build_poison() == POISON


@pytest.mark.parametrize("poison", POISON, ids=lambda poison: poison.name)
def test_poison_gives_its_row(poison: Poison) -> None:
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
def test_broken_files_are_faults_or_images_and_nothing_else(name: str) -> None:
    rng = np.random.default_rng(list(name.encode()))
    num_faults = 0
    for _ in range(300):
        content = mutate(SAMPLES[name], rng)
        image, mask = attempt(decode_image, content), attempt(decode_mask, content)
        if isinstance(image, FaultKind):
            assert image in KINDS
            num_faults += 1
        else:
            assert image.dtype == np.uint8
            assert image.shape[2:] == (3,)
            assert 0 < image.size <= 3 * FEW_PX
        assert mask in KINDS | {FaultKind.MASK_MISMATCH} if isinstance(mask, FaultKind) else mask.ndim == 2
    assert 10 < num_faults < 300  # both happened


@pytest.mark.parametrize("name", SAMPLES)
def test_a_cut_file_is_truncated_or_whole(name: str) -> None:
    """Wherever it is cut; whole where only what stands behind the pixels is missing."""
    content = SAMPLES[name]
    whole = decode_image(content)
    cut = [attempt(decode_image, content[:length]) for length in range(1, len(content))]
    for length, image in enumerate(cut, 1):
        if not isinstance(image, FaultKind):
            np.testing.assert_array_equal(image, whole)
        elif length >= 12:  # enough to tell what it is
            assert image == FaultKind.TRUNCATED, f"cut at {length}"
    assert any(isinstance(image, FaultKind) for image in cut[12:])


@pytest.mark.parametrize("name", [name for name in SAMPLES if name.startswith("png")])
def test_a_png_with_a_flipped_bit_is_a_fault_or_whole(name: str) -> None:
    """It has a checksum of everything; no other format has."""
    content = SAMPLES[name]
    whole = decode_image(content)
    for at, bit in itertools.product(range(len(content)), (0x01, 0x80)):
        broken = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
        image = attempt(decode_image, broken)
        if not isinstance(image, FaultKind):
            np.testing.assert_array_equal(image, whole, err_msg=f"bit {bit} of byte {at}")


def test_poison_is_decoded_in_silence_and_in_little_memory() -> None:
    """In a process of its own: C libraries print by themselves, and pytest has its own filters of warnings."""
    script = """
import contextlib, pathlib, re
import numpy as np
from segray.errors import ImageFault
from segray.data.images import decode_image_with_note
from tests.poison import build_poison, build_samples
from tests.test_poison import mutate

def read_peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text()).group(1)) // 1024

rng = np.random.default_rng(0)
contents = [poison.content for poison in build_poison()]
contents += [mutate(sample, rng) for sample in build_samples().values() for _ in range(20)]
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
    assert int(done.stdout) < 400  # MiB: what an image of 100 million grey pixels and its copies take
