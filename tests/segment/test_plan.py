"""The plan: every image once, in order, in fragments bounded in images and in bytes."""

from pathlib import Path

import pyarrow as pa
import pytest

from segray.config import SegmentSettings
from segray.segment.plan import build_plan, compute_plan_sha256, count_fragments, load_fragment, save_plan

SIZES_BYTES = {"a": 30, "b": 30, "c": 40, "d": 1, "e": 500, "f": 1, "g": 1, "h": 1}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size_bytes in SIZES_BYTES.items():
        (folder / f"{name}.png").write_bytes(bytes(size_bytes))
    (folder / "notes.txt").touch()
    return folder


@pytest.mark.parametrize(
    ("fragment_size", "fragment_bytes", "expected"),
    [
        (3, 10**6, ["abc", "def", "gh"]),
        (8, 100, ["abc", "d", "e", "fgh"]),  # 100 bytes fit to the last; what is larger by itself is alone
        (2, 60, ["ab", "cd", "e", "fg", "h"]),
        (8, 1, list("abcdefgh")),
    ],
)
def test_fragments_keep_both_bounds(images: Path, fragment_size: int, fragment_bytes: int, expected: list[str]) -> None:
    settings = SegmentSettings(fragment_size=fragment_size, fragment_bytes=fragment_bytes)
    plan = build_plan(str(images), None, settings)
    fragments: dict[int, str] = {}
    for row in plan.to_pylist():
        name = Path(row["uri"]).stem
        assert row["uri"] == str(images / f"{name}.png")
        assert row["size_bytes"] == SIZES_BYTES[name]
        fragments[row["fragment"]] = fragments.get(row["fragment"], "") + name
    assert list(fragments.items()) == list(enumerate(expected))
    assert count_fragments(plan) == len(expected)


def test_a_saved_plan_gives_each_fragment_back(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.segment.plan._FRAGMENTS_PER_PLAN_FILE", 2)
    plan = build_plan(str(images), None, SegmentSettings(fragment_size=3))
    output = tmp_path / "run"
    (output / "plan").mkdir(parents=True)
    (output / "plan" / "plan-00002.parquet").write_bytes(b"of a longer listing")
    save_plan(str(output), plan)
    assert sorted(path.name for path in (output / "plan").iterdir()) == ["plan-00000.parquet", "plan-00001.parquet"]
    sha256 = compute_plan_sha256(plan)
    assert pa.concat_tables(load_fragment(str(output), sha256, fragment) for fragment in range(3)).equals(plan)


def test_the_plans_sha256_tells_listings_and_cuts_apart(images: Path) -> None:
    def compute(**settings: int) -> str:
        return compute_plan_sha256(build_plan(str(images), None, SegmentSettings(**settings)))

    first = compute()
    assert compute() == first
    assert compute(fragment_size=3) != first
    (images / "h.png").write_bytes(b"22")
    assert compute() != first
