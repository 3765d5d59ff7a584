"""The slow faults of docs/guides/faults.md in processes: killed ones, lost nodes, and jobs on the same run."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.buckets import Bucket
from tests.faults.proxy import Call, FaultProxy, Operation, Point, Request, Rule
from tests.faults.scene import Clean, Cluster, Scene, require_invariant

pytestmark = pytest.mark.slow
FRAGMENT = r"images/part-"
NUM_DRIVER_KILLS = 5


@pytest.fixture
def own_cluster(filled_bucket: Bucket, tmp_path: Path) -> Iterator[Scene]:
    """A scene with its own cluster, which the test may break."""
    with (
        FaultProxy(filled_bucket.endpoint) as proxy,
        Cluster(filled_bucket.build_environment(filled_bucket.endpoint)) as cluster,
        Scene(filled_bucket, proxy, cluster, tmp_path) as scene,
    ):
        yield scene


@pytest.mark.parametrize("point", ["before", "after"])
def test_rows_are_identical_after_a_killed_decode_task(scene: Scene, clean: Clean, output: str, point: Point) -> None:
    scene.proxy.set_rules(Rule(Call(Request.kill_peer, point), "GET", r"^images/", nth=5))
    run = scene.run(output)
    assert run.process.returncode == 0, run.text
    require_invariant(scene.read_files(output), clean.files)


@pytest.mark.parametrize("written", [0, 3])
def test_rows_are_identical_after_a_killed_predictor(scene: Scene, clean: Clean, output: str, written: int) -> None:
    killed = []

    def kill(_: Request) -> None:
        assert scene.cluster is not None
        for pid in scene.cluster.find_workers("FragmentPredictor"):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    scene.proxy.set_rules(Rule(Call(kill), "PUT", rf"{FRAGMENT}0000000{written}"))
    run = scene.run(output)
    assert run.process.returncode == 0, run.text
    assert killed
    require_invariant(scene.read_files(output), clean.files)


@pytest.mark.parametrize("point", ["before", "during", "after"])
def test_rows_are_identical_after_a_killed_writer(scene: Scene, clean: Clean, output: str, point: Point) -> None:
    scene.proxy.set_rules(Rule(Call(Request.kill_peer, point), "PUT", r"part-00000002", nth=1))
    run = scene.run(output)
    assert run.process.returncode == 0, run.text
    require_invariant(scene.read_files(output), clean.files)
    assert scene.proxy.count("PUT", r"part-00000002") == 2


@pytest.mark.parametrize("operation", ["LIST", "PUT"])
def test_rows_are_identical_after_killed_raylets(
    own_cluster: Scene, clean: Clean, output: str, operation: Operation
) -> None:
    """Kill both worker nodes one after the other, during the listing or during the fragments."""
    scene = own_cluster
    assert scene.cluster is not None
    raylets = iter(scene.cluster.raylets)

    def kill(_: Request) -> None:
        os.kill(next(raylets), signal.SIGKILL)

    key = FRAGMENT if operation == "PUT" else ""
    scene.proxy.set_rules(*(Rule(Call(kill), operation, key, nth=nth) for nth in (2, 4)))
    run = scene.run(output)
    assert run.process.returncode == 0, run.text
    assert next(raylets, None) is None
    require_invariant(scene.read_files(output), clean.files)


@pytest.mark.parametrize("number", range(NUM_DRIVER_KILLS))
def test_a_rerun_completes_a_run_whose_driver_was_killed_at_any_point(
    scene: Scene, clean: Clean, output: str, number: int
) -> None:
    share = (number + random.Random(number).random()) / NUM_DRIVER_KILLS
    nth = 1 + int(share * clean.num_requests)
    run = scene.start(output)
    scene.proxy.set_rules(Rule(Call(lambda _: run.kill(), "after"), nth=nth))
    run.wait()
    assert run.process.returncode == -signal.SIGKILL
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
    with Cluster(scene.bucket.build_environment(scene.bucket.endpoint)) as scene.cluster:
        again = scene.run(output)
    assert again.process.returncode == 0, again.text
    require_invariant(scene.read_files(output), clean.files)


@pytest.mark.parametrize("offset_s", [0, 2.5])
def test_a_job_submitted_twice_writes_every_row_once(scene: Scene, clean: Clean, output: str, offset_s: float) -> None:
    first = scene.start(output)
    time.sleep(offset_s)
    second = scene.start(output)
    assert (first.wait(), second.wait()) == (0, 0), first.text + second.text
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
