"""The slow faults of docs/guides/faults.md in processes: killed ones, lost nodes, and jobs on the same run."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.buckets import Bucket
from tests.faults.proxy import KILL_TIMEOUT_S, Call, FaultProxy, Operation, Point, Request, Rule
from tests.faults.scene import Clean, Cluster, Run, Scene, require_invariant

pytestmark = pytest.mark.slow
FRAGMENT = r"images/part-"
# When a driver is killed: once the n-th such request has been answered.
DRIVER_KILLS: list[tuple[Operation, str, int]] = [
    ("LIST", "", 2),
    ("PUT", r"run\.json", 1),
    ("GET", r"^images/", 7),
    ("PUT", FRAGMENT, 2),
    ("PUT", r"summary\.parquet", 1),
]


@pytest.fixture
def own_cluster(filled_bucket: Bucket, tmp_path: Path) -> Iterator[Scene]:
    """A scene with its own cluster, which the test may break."""
    with (
        FaultProxy(filled_bucket.endpoint) as proxy,
        Cluster(filled_bucket.build_environment(filled_bucket.endpoint)) as cluster,
        Scene(filled_bucket, proxy, cluster, tmp_path) as scene,
    ):
        yield scene


def test_rows_are_identical_after_killed_decode_tasks(scene: Scene, clean: Clean, output: str) -> None:
    """Kill the process that requests an image, once before the store answers and once after it."""
    scene.proxy.set_rules(
        Rule(Call(Request.kill_peer, "before"), "GET", r"^images/", nth=5),
        Rule(Call(Request.kill_peer, "after"), "GET", r"^images/", nth=14),
    )
    run = scene.run(output)
    assert run.process.returncode == 0, run.text
    require_invariant(scene.read_files(output), clean.files)


def test_rows_are_identical_after_killed_predictors(scene: Scene, clean: Clean, output: str) -> None:
    """Kill every predictor while the first fragment is written, and its successor at the fourth."""
    killed: list[set[int]] = []

    def kill(_: Request) -> None:
        assert scene.cluster is not None
        deadline_s = time.monotonic() + KILL_TIMEOUT_S
        while not (found := set(scene.cluster.find_workers("FragmentPredictor")).difference(*killed)):
            if time.monotonic() > deadline_s:  # The successor may still be starting.
                raise TimeoutError("no predictor to kill")
            time.sleep(0.1)
        killed.append(found)
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    scene.proxy.set_rules(*(Rule(Call(kill), "PUT", rf"{FRAGMENT}0000000{written}", nth=1) for written in (0, 3)))
    run = scene.run(output)
    assert run.process.returncode == 0, run.text
    assert len(killed) == 2
    require_invariant(scene.read_files(output), clean.files)


def test_rows_are_identical_after_killed_writers(scene: Scene, clean: Clean, output: str) -> None:
    """Kill the writers of three fragments: before their PUT, after half of its body, and after the store applied it."""
    points: dict[str, Point] = {r"part-00000001": "before", r"part-00000002": "during", r"part-00000004": "after"}
    rules = [Rule(Call(Request.kill_peer, point), "PUT", fragment, nth=1) for fragment, point in points.items()]
    scene.proxy.set_rules(*rules)
    run = scene.run(output)
    assert run.process.returncode == 0, run.text
    require_invariant(scene.read_files(output), clean.files)
    assert [scene.proxy.count("PUT", fragment) for fragment in points] == [2, 2, 2]


def test_rows_are_identical_after_killed_raylets(own_cluster: Scene, clean: Clean, output: str) -> None:
    """Kill both worker nodes: one during the listing, the other while fragments are written."""
    scene = own_cluster
    assert scene.cluster is not None
    raylets = iter(scene.cluster.raylets)

    def kill(_: Request) -> None:
        os.kill(next(raylets), signal.SIGKILL)

    scene.proxy.set_rules(Rule(Call(kill), "LIST", nth=2), Rule(Call(kill), "PUT", FRAGMENT, nth=2))
    run = scene.run(output)
    assert run.process.returncode == 0, run.text
    assert next(raylets, None) is None
    require_invariant(scene.read_files(output), clean.files)


def test_a_rerun_completes_a_run_whose_driver_was_killed_in_each_stage(scene: Scene, clean: Clean, output: str) -> None:
    for operation, key, nth in DRIVER_KILLS:
        run = scene.start(output)

        def kill(_: Request, run: Run = run) -> None:
            run.kill()

        scene.proxy.set_rules(Rule(Call(kill, "after"), operation, key, nth=nth))
        run.wait()
        assert run.process.returncode == -signal.SIGKILL, (operation, key, nth, run.text)
    scene.proxy.clear()
    again = scene.run(output)
    assert again.process.returncode == 0, again.text
    require_invariant(scene.read_files(output), clean.files)


def test_a_rerun_on_a_new_cluster_completes_a_run_whose_head_was_killed(
    own_cluster: Scene, clean: Clean, output: str
) -> None:
    scene = own_cluster
    assert scene.cluster is not None
    head = scene.cluster.head

    def kill(_: Request) -> None:
        for pid in head:
            os.kill(pid, signal.SIGKILL)

    scene.proxy.set_rules(Rule(Call(kill), "PUT", FRAGMENT, nth=3))
    run = scene.run(output)
    assert run.process.returncode != 0
    scene.proxy.clear()
    with Cluster(scene.bucket.build_environment(scene.bucket.endpoint), num_nodes=0) as scene.cluster:
        again = scene.run(output)
    assert again.process.returncode == 0, again.text
    require_invariant(scene.read_files(output), clean.files)


def test_a_job_submitted_several_times_writes_every_row_once(scene: Scene, clean: Clean, output: str) -> None:
    """Submit two at once, and one a little later."""
    runs = [scene.start(output), scene.start(output)]
    time.sleep(2.5)
    runs.append(scene.start(output))
    assert [run.wait() for run in runs] == [0, 0, 0], "".join(run.text for run in runs)
    require_invariant(scene.read_files(output), clean.files)


def test_a_writer_that_resumes_after_its_fragment_was_rewritten_changes_nothing(
    scene: Scene, clean: Clean, output: str
) -> None:
    is_stopped, may_continue = threading.Event(), threading.Event()

    def stop(request: Request) -> None:
        pid = request.find_peer_pid()
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        is_stopped.set()
        may_continue.wait(200)
        os.kill(pid, signal.SIGCONT)

    fragment = rf"{FRAGMENT}00000002"
    scene.proxy.set_rules(Rule(Call(stop), "PUT", fragment, nth=1))
    first = scene.start(output)
    assert is_stopped.wait(120)
    second = scene.run(output)
    assert second.process.returncode == 0, second.text
    require_invariant(scene.read_files(output), clean.files)
    may_continue.set()
    assert first.wait() == 0, first.text
    assert scene.proxy.count("PUT", fragment) == 2
    require_invariant(scene.read_files(output), clean.files)
