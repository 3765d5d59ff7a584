"""A thousand mutated files decoded in a child process; ``benchmarks/fuzz_decode.py`` decodes a hundred thousand."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.data.fuzzing import chunk
from tests.data.fuzzing.child import check_file
from tests.data.fuzzing.chunk import run_chunk
from tests.data.fuzzing.generate import generate_file
from tests.data.fuzzing.seeds import build_seeds

NUM_FILES = 1000


def test_mutated_files_give_an_image_or_a_fault_within_the_limits(tmp_path: Path) -> None:
    results = run_chunk(0, 0, NUM_FILES, tmp_path / "results")
    assert [result.index for result in results] == list(range(NUM_FILES))
    assert [result for result in results if result.finding] == []
    for name in build_seeds():  # The mutations neither leave all files valid nor break all of them.
        outcomes = Counter(result.image for result in results if result.format == name)
        assert outcomes["ok"] > 0.1 * outcomes.total()
        assert outcomes["unreadable"] > 0
        assert outcomes["truncated"] > 0


def test_a_file_depends_only_on_seed_and_index() -> None:
    files = [generate_file(3, index) for index in range(50)]
    assert [generate_file(3, index) for index in reversed(range(50))] == files[::-1]
    assert len(set(files)) > 45
    assert generate_file(4, 0) != files[0]


def test_every_seed_file_is_an_image_unless_its_pixels_are_unsupported() -> None:
    outcomes = Counter(check_file(content)[0] for files in build_seeds().values() for content in files)
    assert outcomes == {"ok": outcomes.total() - 2, "unsupported": 2}  # TIFF files of 32-bit pixels.


def test_a_file_that_ends_the_process_is_a_finding_and_the_others_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child's module is replaced by a script that is killed at the third file, with half of its line written."""
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import json, os, sys\n"
        "seed, start, stop, path = sys.argv[1:]\n"
        "with open(path, 'a') as results:\n"
        "    for index in range(int(start), int(stop)):\n"
        "        line = json.dumps(dict(index=index, format='png', image='ok', mask='ok'))\n"
        "        results.write(line[:9] if index == 2 else line + chr(10))\n"
        "        results.flush()\n"
        "        if index == 2:\n"
        "            os.kill(os.getpid(), 11)\n"
    )
    monkeypatch.setattr(chunk, "CHILD", (str(fake),))
    results = run_chunk(0, 0, 5, tmp_path / "results")
    assert [(result.index, result.finding) for result in results] == [
        (0, ""),
        (1, ""),
        (2, "crashed with SIGSEGV"),
        (3, ""),
        (4, ""),
    ]
    lines = (tmp_path / "results").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(5))
    fake.unlink()
    assert run_chunk(0, 0, 5, tmp_path / "results") == results  # Nothing is decoded again.
    with pytest.raises(RuntimeError, match="seed 0, files 5 to 6: exit code"):
        run_chunk(0, 0, 6, tmp_path / "results")
