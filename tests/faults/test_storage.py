"""The slow faults of docs/guides/faults.md in storage: it refuses, throttles, corrupts, or is full."""

import re
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.faults.buckets import BUCKET
from tests.faults.proxy import Action, Call, Request, Rule
from tests.faults.scene import NO_COUNTS, NOT_COMPARED, Clean, Scene, read_table, require_invariant

pytestmark = pytest.mark.slow
THROTTLED_S = 180


def test_a_refusal_stops_the_run_and_a_rerun_completes_it(scene: Scene, clean: Clean, output: str) -> None:
    refusals = [
        (Rule(Action.FORBIDDEN, "GET", r"^images/"), ".png: permission denied (AccessDenied); check"),
        (
            Rule(Action.EXPIRED, "PUT", r"part-00000003"),
            "/part-00000003.parquet: the credentials have expired; renew them",
        ),
    ]
    for rule, message in refusals:
        scene.proxy.set_rules(rule)
        run = scene.run(output)
        assert run.process.returncode == 4, run.text
        assert message in run.error
        assert run.err.read_text().count("\n") <= 2  # Ray may print one more line.
    scene.proxy.clear()
    assert scene.run(output).process.returncode == 0
    require_invariant(scene.read_files(output), clean.files)


def test_an_image_with_a_refusal_of_its_own_becomes_an_error_row(scene: Scene, clean: Clean, output: str) -> None:
    key = "images/image-14.png"
    scene.proxy.set_rules(Rule(Action.FORBIDDEN, "GET", f"^{key}"))
    run = scene.run(output)
    assert run.process.returncode == 0, run.text
    files = scene.read_files(output)
    require_invariant(files, clean.files, except_for=[key])
    (row,) = [row for row in read_table(files).to_pylist() if row["uri"].endswith(key)]
    assert (row["status"], row["error_kind"]) == ("error", "forbidden")
    scene.proxy.clear()
    assert scene.run(output, retry_errors="true").process.returncode == 0
    require_invariant(scene.read_files(output), clean.files)


def test_an_unavailable_store_is_reported_within_a_minute(scene: Scene, clean: Clean, output: str) -> None:
    down_s: list[float] = []

    def go_down(_: Request) -> None:
        down_s.append(time.monotonic())
        scene.proxy.set_rules(Rule(Action.RESET))

    scene.proxy.set_rules(Rule(Call(go_down, "after"), "PUT", r"part-00000001"))
    run = scene.run(output)
    assert run.process.returncode == 4, run.text
    assert time.monotonic() - down_s[0] < 60
    assert re.search(r"attempts in 3[0-4] s", run.error)  # 30 s and the last wait.
    assert f"s3://{BUCKET}/" in run.error
    scene.proxy.clear()
    assert scene.run(output).process.returncode == 0
    require_invariant(scene.read_files(output), clean.files)


def test_rows_are_identical_after_three_minutes_in_which_95_percent_of_requests_are_throttled(
    scene: Scene, clean: Clean, output: str
) -> None:
    scene.proxy.set_rules(Rule(Action.UNAVAILABLE, probability=0.95))
    calm = threading.Timer(THROTTLED_S, scene.proxy.clear)
    calm.start()
    began_s = time.monotonic()
    run = scene.start(output)
    try:
        run.process.wait(3 * THROTTLED_S)
    finally:
        calm.cancel()
    assert run.process.returncode == 0, run.text
    assert time.monotonic() - began_s > THROTTLED_S / 2, "the run was throttled for long"
    require_invariant(scene.read_files(output), clean.files)


def test_corrupted_bytes_are_detected_and_transferred_again(scene: Scene, clean: Clean, output: str) -> None:
    """Corrupt images and masks, whose entity tag is their MD5; rows, whose pages have checksums; and one write."""
    scene.proxy.set_rules(
        Rule(Action.FLIP_BYTE, "GET", r"^(images|masks)/", probability=0.4),
        Rule(Action.FLIP_BYTE, "GET", r"part-", probability=0.2),  # Only pages have checksums in range requests.
        Rule(Action.FLIP_BYTE, "PUT", nth=4),
    )
    run = scene.run(output)
    assert run.process.returncode == 0, run.text
    require_invariant(scene.read_files(output), clean.files)
    # A corrupted read has status 200 too, so repeated requests are the only sign of it.
    assert scene.proxy.count("GET", r"^(images|masks)/") > 1.2 * clean.num_image_reads
    assert scene.proxy.count("PUT", NO_COUNTS) == clean.num_writes + 1


def test_a_write_whose_response_was_lost_is_repeated(scene: Scene, clean: Clean, output: str) -> None:
    scene.proxy.set_rules(Rule(Action.LOST_ANSWER, "PUT", probability=0.5))
    run = scene.run(output)
    assert run.process.returncode == 0, run.text
    require_invariant(scene.read_files(output), clean.files)
    assert scene.proxy.count("PUT") > 1.2 * clean.num_writes


def test_a_full_disk_stops_the_run_and_a_rerun_completes_it(scene: Scene, clean: Clean, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)], check=True)
    try:
        run = scene.run(f"{disk}/run")
        assert run.process.returncode == 4, run.text
        assert "No space left on device; free some space" in run.error
        assert re.search(rf"cannot write {disk}/run/(images/part|counts/counts)-\w+\.parquet: ", run.error)
        written = list(disk.rglob("*.parquet"))
        assert 0 < len(written) < len(clean.files)
        assert not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        again = scene.run(f"{disk}/run")
        assert again.process.returncode == 0, again.text
        paths = [path for path in (disk / "run").rglob("*.parquet") if path.parent.name not in NOT_COMPARED]
        require_invariant({str(path.relative_to(disk / "run")): path.read_bytes() for path in paths}, clean.files)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
