"""One fault of each family: the fault tests that are not slow."""

import io

import pytest
from pyarrow import parquet as pq

from tests.faults.buckets import Bucket
from tests.faults.proxy import Action, Call, Request, Rule
from tests.faults.scene import FRAGMENT_SIZE, NUM_GOOD, Clean, Scene, pick_poison, read_table, require_invariant

NUM_IMAGES = NUM_GOOD + len(pick_poison())


@pytest.mark.every_store
def test_the_fault_free_run_has_a_row_for_every_image(filled_bucket: Bucket, clean: Clean) -> None:
    rows = read_table(clean.files).to_pylist()
    assert len(rows) == len({row["uri"] for row in rows}) == NUM_IMAGES
    kinds = {row["uri"].removeprefix(f"{filled_bucket.uri}/images/"): row["error_kind"] for row in rows}
    poison = pick_poison()
    assert len(set(poison)) >= 4
    assert {name for name, kind in kinds.items() if kind is not None} == set(poison)
    assert all(len(row["mask"]) == row["height"] * row["width"] for row in rows if row["status"] == "ok")


@pytest.mark.every_store
def test_rows_are_identical_if_a_third_of_all_requests_fail(scene: Scene, clean: Clean, output: str) -> None:
    scene.proxy.set_rules(
        *(
            Rule(action, operation, probability=0.12)  # Three actions per operation: 32% of its requests fail.
            for operation in ("GET", "PUT", "LIST")
            for action in (Action.UNAVAILABLE, Action.RESET, Action.CUT_BODY)
        )
    )
    run = scene.run(output)
    assert run.process.returncode == 0, run.text
    require_invariant(scene.read_files(output), clean.files)
    failed = [request for request in scene.proxy.requests if request.status in (503, None)]
    assert len(failed) > 0.1 * len(scene.proxy.requests)  # Without cut bodies, whose status is 200.


@pytest.mark.every_store
def test_a_rerun_after_a_killed_driver_reads_only_the_remaining_images(scene: Scene, clean: Clean, output: str) -> None:
    run = scene.start(output)
    scene.proxy.set_rules(Rule(Call(lambda _: run.kill(), "after"), "PUT", r"images/part-", nth=3))
    run.wait()
    assert scene.read_json(output)["status"] == "running"
    scene.proxy.clear()
    scene.wait_for_silence()
    finished = scene.read_files(output)
    assert 0 < len(finished) < len(clean.files) - 1
    rows = read_table(finished)["uri"].to_pylist()
    scene.proxy.forget()
    again = scene.run(output)
    assert again.process.returncode == 0, again.text
    require_invariant(scene.read_files(output), clean.files)
    read = [f"{scene.bucket.uri}/{request.key}" for request in scene.proxy.requests if request.operation == "GET"]
    assert not set(rows) & set(read)
    images = [uri for uri in read if "/images/" in uri and "/runs/" not in uri]
    # Each of the others is read once.
    assert sorted(images) == sorted(set(read_table(clean.files)["uri"].to_pylist()) - set(rows))
    scene.proxy.forget()
    assert scene.run(output).process.returncode == 0
    assert scene.proxy.count("PUT") == 0


def test_an_image_that_kills_its_worker_becomes_one_error_row(scene: Scene, clean: Clean, output: str) -> None:
    scene.proxy.set_rules(Rule(Call(Request.kill_peer), "GET", r"^images/image-12\.png"))
    run = scene.run(output)
    assert run.process.returncode == 0, run.text
    files = scene.read_files(output)
    require_invariant(files, clean.files, except_for=["images/image-12.png"])
    (row,) = [row for row in read_table(files).to_pylist() if row["uri"].endswith("/image-12.png")]
    assert (row["status"], row["error_kind"], row["mask"]) == ("error", "failed", None)
    assert "died 3 times" in row["error_message"]
    # Once in the normal way, once after another image unless it is the first of its fragment, and three times alone.
    assert scene.proxy.count("GET", r"^images/image-12\.png") in (4, 5)


@pytest.mark.every_store
def test_objects_changed_or_deleted_after_planning_become_error_rows(scene: Scene, clean: Clean, output: str) -> None:
    changed, deleted, mask = "images/image-13.png", "images/image-15.png", "masks/image-11.png"
    contents = {key: scene.bucket.get(key) for key in (changed, deleted, mask)}

    def change(_: Request) -> None:
        scene.bucket.put(changed, contents[deleted])
        scene.bucket.delete(deleted)
        scene.bucket.put(mask, contents[mask] + b" ")

    scene.proxy.set_rules(Rule(Call(change, "after"), "PUT", r"run\.json", nth=1))
    try:
        run = scene.run(output)
    finally:
        for key, content in contents.items():
            scene.bucket.put(key, content)
    assert run.process.returncode == 0, run.text
    files = scene.read_files(output)
    require_invariant(files, clean.files, except_for=[changed, deleted, "images/image-11.png"])
    kinds = {row["uri"].rpartition("/")[2]: row["error_kind"] for row in read_table(files).to_pylist()}
    assert [kinds[f"image-{n}.png"] for n in (13, 15, 11, 14)] == ["changed", "missing", "changed", None]
    # The objects have been restored, so a rerun processes only the fragments with error rows.
    scene.proxy.clear()
    scene.proxy.forget()
    again = scene.run(output, retry_errors="true")
    assert again.process.returncode == 0, again.text
    require_invariant(scene.read_files(output), clean.files)
    rows = read_table(clean.files)["uri"].to_pylist()
    with_errors = {
        rows.index(row["uri"]) // FRAGMENT_SIZE for row in read_table(files).to_pylist() if row["error_kind"]
    }
    assert {
        int(request.key[-16:-8])
        for request in scene.proxy.requests
        if "images/part" in request.key and request.operation == "PUT"
    } == with_errors


@pytest.mark.every_store
def test_no_credential_is_in_any_file_output_or_log(scene: Scene, clean: Clean, output: str) -> None:
    """Read the files of two runs, one of which stops, and the logs of Ray, also those of the tests before."""
    scene.proxy.set_rules(Rule(Action.FORBIDDEN, "PUT", r"part-00000002"))
    run = scene.run(output)
    assert run.process.returncode == 4, run.text
    keys = scene.bucket.list_keys("clean/") + scene.bucket.list_keys(f"{output}/")
    contents = {key: read_content(scene.bucket, key) for key in keys}
    assert scene.cluster is not None
    logs = {str(path): path.read_text(errors="replace") for path in scene.cluster.session.rglob("*") if path.is_file()}
    assert min(len(contents), len(logs)) > 10
    contents |= {**logs, "output": run.text}
    assert [name for name, content in contents.items() if scene.bucket.secret in content] == []


def read_content(bucket: Bucket, key: str) -> str:
    """Return the content of a file as text; of a Parquet file, its metadata and all columns but the masks."""
    content = bucket.get(key)
    if not key.endswith(".parquet"):
        return content.decode(errors="replace")
    schema = pq.read_schema(io.BytesIO(content))
    columns = [name for name in schema.names if name != "mask"]
    return f"{schema.metadata} {pq.read_table(io.BytesIO(content), columns=columns).to_pylist()}"
