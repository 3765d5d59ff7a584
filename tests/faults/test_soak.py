"""A short soak under kills, on a local disk; and the parts of the soak themselves, which must find what is wrong."""

import json
import mmap
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from segray.data.images import decode_image
from segray.errors import ImageFault
from tests.faults.scene import ROOT
from tests.faults.soak import disturb, processes
from tests.faults.soak.checks import check_rows, check_summary, choose_fragments, compare_fragments
from tests.faults.soak.disturb import DisturbedRun
from tests.faults.soak.images import ImageSet
from tests.faults.soak.place import Place
from tests.faults.soak.processes import KINDS, Killer, MemoryLog, find_workers, kill_tree, summarize_memory

IMAGES = ImageSet(60, 10)
FRAGMENT_SIZE = 7
# Stands for the command: a process of each kind that ends with it, one that does not, and fragments that are written.
COMMAND = """
import pathlib, subprocess, sys, time
output, num_fragments = pathlib.Path(sys.argv[1]), int(sys.argv[2])
output.mkdir(exist_ok=True)
wait = "import os, time; parent = os.getppid()\\nwhile os.getppid() == parent: time.sleep(0.05)"
for title in ("FragmentDecoder", "FragmentPredictor", "FragmentWriter", "ray::Ledger"):
    subprocess.Popen([sys.executable, "-S", "-c", wait, title])
subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)", "ray::IDLE"])
for number in range(num_fragments):
    if not (output / f"part-{number:08d}.parquet").exists():
        time.sleep(0.03)
        (output / f"part-{number:08d}.parquet").touch()
"""


@pytest.mark.slow
def test_a_short_soak_finds_nothing_wrong(tmp_path: Path) -> None:
    """2,000 images, 80 of them broken, in fragments of 32."""
    command = [sys.executable, str(ROOT / "benchmarks/soak.py"), "--folder", str(tmp_path / "soak")]
    command += ["--images", "2000", "--broken-every", "25", "--fragment-size", "32"]
    command += ["--kill-s", "5", "--calm-share", "0.5", "--compare", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    summary = json.loads((tmp_path / "soak/summary.json").read_text())
    assert summary["problems"] == []
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(summary["rows"].values()) == 2000
    assert summary["rows"]["ok"] == 1920
    assert summary["killed"]["driver"] >= 1
    assert sum(summary["killed"].values()) >= 4


def test_each_image_of_a_soak_has_the_declared_kind_and_generation_resumes(tmp_path: Path) -> None:
    IMAGES.write_files(tmp_path)
    images = list(IMAGES.iterate())
    assert sorted(str(path.relative_to(tmp_path / "images")) for path in (tmp_path / "images").rglob("*.*")) == [
        image.key for image in images
    ]
    assert sum(image.kind is not None for image in images) == 6
    assert len({image.number for image in images}) == 60
    for image in images:
        try:
            decode_image((tmp_path / "images" / image.key).read_bytes(), 1_000_000)
            kind = None
        except ImageFault as fault:
            kind = str(fault.kind)
        assert kind == image.kind
    kept = tmp_path / "images" / images[0].key
    kept.unlink()
    IMAGES.write_files(tmp_path)
    assert not kept.exists()  # A folder that is complete is not written again.
    kept.parent.rename(tmp_path / "unfinished")
    IMAGES.write_files(tmp_path)
    assert kept.exists()


def write_run(folder: Path, rows: Sequence[dict[str, Any]], status: str = "complete") -> str:
    """Write rows as the fragments of a run, and return its URI."""
    (folder / "images").mkdir(parents=True)
    fields = [(name, pa.string()) for name in ("uri", "status", "error_kind", "error_message")]
    for number in range(0, len(rows), FRAGMENT_SIZE):
        table = pa.Table.from_pylist(list(rows[number : number + FRAGMENT_SIZE]), pa.schema(fields))
        pq.write_table(table, folder / f"images/part-{number // FRAGMENT_SIZE:08d}.parquet")
    (folder / "run.json").write_text(json.dumps({"status": status, "counts": {"planned": IMAGES.num_images}}))
    return str(folder)


def make_rows() -> list[dict[str, Any]]:
    """Return the correct rows of all images."""
    return [
        {"uri": f"/data/{image.key}", "status": "error" if image.kind else "ok", "error_kind": image.kind}
        for image in IMAGES.iterate()
    ]


def test_every_kind_of_wrong_row_is_found(tmp_path: Path) -> None:
    rows = make_rows()
    found, problems = check_rows(IMAGES, "/data", write_run(tmp_path / "good", rows))
    assert problems == []
    assert sum(found.values()) == 60
    assert found["ok"] == 54
    wrong = {
        "lost": (rows[1:], "has no row"),
        "twice": ([*rows, rows[5]], "has a row already"),
        "failed": ([{**rows[0], "status": "error", "error_kind": "failed"}, *rows[1:]], "expected None, got failed"),
        "other": ([{**rows[0], "uri": "/data/other"}, *rows[1:]], "/data/other is not an image"),
    }
    for name, (changed, message) in wrong.items():
        assert message in "\n".join(check_rows(IMAGES, "/data", write_run(tmp_path / name, changed))[1])
    (problem,) = check_rows(IMAGES, "/data", write_run(tmp_path / "running", rows, "running"))[1]
    assert problem.startswith("run.json: running")


def test_a_summary_that_is_not_the_sum_of_the_rows_is_found(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, counts in enumerate(([[1, 2], None, [3, 4]], [None], [[5, 6]])):
        table = pa.table({"pixel_count": pa.array(counts, pa.list_(pa.int64()))})
        pq.write_table(table, tmp_path / f"images/part-{number:08d}.parquet")
    pq.write_table(pa.table({"pixel_count": [9, 12]}), tmp_path / "summary.parquet")
    assert check_summary(str(tmp_path)) == []
    pq.write_table(pa.table({"pixel_count": [9, 13]}), tmp_path / "summary.parquet")
    assert check_summary(str(tmp_path)) == ["summary.parquet has [9, 13] pixels of the classes, the rows have [9, 12]"]


def test_a_sampled_fragment_with_other_bytes_is_found(tmp_path: Path) -> None:
    rows = make_rows()
    output = write_run(tmp_path / "run", rows)
    chosen, uris = choose_fragments(output, 100, FRAGMENT_SIZE)
    assert len(chosen) == 8  # The last one has only four images.
    assert uris == [row["uri"] for row in rows[:56]]
    assert compare_fragments(output, chosen, write_run(tmp_path / "calm", rows[:56])) == []
    rows[10]["error_message"] = "other"
    assert compare_fragments(output, chosen, write_run(tmp_path / "different", rows[:56])) == [
        "part-00000001.parquet differs from part-00000001.parquet of the run without faults"
    ]
    assert compare_fragments(output, chosen, write_run(tmp_path / "fewer", rows[:49])) == [
        "the run without faults has 7 fragments, expected 8"
    ]


class FakePlace(Place):
    """Starts ``COMMAND`` instead of ``segray segment``."""

    @contextmanager
    def start_segment(self, *_: Any) -> "Iterator[subprocess.Popen[bytes]]":
        process = subprocess.Popen([sys.executable, "-c", COMMAND, f"{self.output_uri}/images", "60"])
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_tree(psutil.Process(process.pid))
            process.wait()


def test_a_disturbed_run_goes_on_until_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturb, "_COUNT_S", 0.01)
    monkeypatch.setattr(processes, "_END_TIMEOUT_S", 0.5)
    (tmp_path / "run").mkdir()
    place = FakePlace(tmp_path, "", str(tmp_path / "run"), {})
    killer = Killer(0.5, tmp_path / "kills.csv")
    run = DisturbedRun(place, [], killer, 50)
    run.run()
    assert len(list((tmp_path / "run/images").iterdir())) == 60
    assert run.unexpected == []
    assert run.num_starts == killer.num_killed["driver"] + 1 >= 2
    assert killer.num_killed.total() > killer.num_killed["driver"]
    assert Killer(0.5, tmp_path / "kills.csv").num_killed == killer.num_killed
    assert (tmp_path / "memory.csv").read_text().startswith("at_s,kind,pid,")


def test_processes_are_found_by_kind_and_end_with_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_END_TIMEOUT_S", 2)
    with subprocess.Popen([sys.executable, "-c", COMMAND, str(tmp_path), "100000"]) as process:
        driver = psutil.Process(process.pid)
        deadline_s = time.monotonic() + 30
        while len(others := driver.children(recursive=True)) < 5 and time.monotonic() < deadline_s:
            time.sleep(0.1)
        while not all(find_workers(driver).values()) and time.monotonic() < deadline_s:
            time.sleep(0.1)  # A process has its command line only after it was forked.
        assert [len(found) for found in find_workers(driver).values()] == [1, 1, 1, 1]
        kill_tree(driver)
    assert len(others) == 5  # The fifth one is killed, because it does not end with its driver.
    time.sleep(0.1)
    for other in others:
        assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE


def test_memory_that_is_shared_with_other_processes_is_left_out(tmp_path: Path) -> None:
    this, own = psutil.Process(), []
    log = MemoryLog(tmp_path / "memory.csv")
    with mmap.mmap(-1, 2**26) as shared:
        for _ in range(2):
            log.sample({"driver": [this], "predictor": [], "decoder": []}, 0)
            own.append(int((tmp_path / "memory.csv").read_text().splitlines()[-1].split(",")[4]))
            shared.write(bytes(2**20) * 32)
            shared.seek(0)
    log.close()
    assert own[1] - own[0] < 2**24
    assert own[0] > 2**20


def test_growing_memory_is_seen_in_the_longest_life_of_a_process(tmp_path: Path) -> None:
    lines = ["at_s,kind,pid,started_s,own_bytes,num_written"]
    for at_s in range(0, 800, 10):
        lines.append(f"{at_s},driver,1,0,{(100 + at_s) * 2**20},5")
        lines.append(f"{at_s},predictor,{2 + at_s // 100},{at_s // 100 * 100},{500 * 2**20},5")
    (tmp_path / "memory.csv").write_text("\n".join(lines) + "\n")
    driver, predictor = summarize_memory(tmp_path / "memory.csv")
    assert driver["longest_life_s"] == 790
    assert driver["its_last_quarter_mib"] == pytest.approx(100 + 700, abs=20)
    assert driver["its_first_quarter_mib"] == pytest.approx(100 + 130, abs=20)
    assert (predictor["first_quarter_mib"], predictor["most_mib"], predictor["longest_life_s"]) == (500, 500, 90)
    assert predictor["samples"] == 8 * 6
    assert {"driver", "predictor"} < set(KINDS)
