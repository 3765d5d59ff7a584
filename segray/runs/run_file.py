"""A run folder and its fingerprint: what was planned, with which model and settings, and how it ended."""

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from segray.config import find_differences
from segray.errors import MissingFileError, RunMismatchError
from segray.runs.plan import Plan
from segray.schema import get_library_versions
from segray.storage import join_uri, read_bytes, write_bytes


@dataclass(frozen=True)
class Fingerprint:
    """What decides, together with the plan, every byte of a run's rows."""

    bundle_sha256: str
    config: dict[str, Any]


def get_run_uri(output_uri: str) -> str:
    """Return where a run's ``run.json`` is."""
    return join_uri(output_uri, "run.json")


def read_run(output_uri: str) -> dict[str, Any] | None:
    """Return the content of ``run.json``, or None if nothing ran here yet.

    Raises:
        RunMismatchError: There is a file of this name, and it is not of a run of segray.
    """
    uri = get_run_uri(output_uri)
    try:
        content = json.loads(read_bytes(uri))
        fingerprint, counts = content["fingerprint"], content["counts"]
        if not {"bundle_sha256", "config", "plan_sha256", "cut_sha256"} <= fingerprint.keys() or not isinstance(
            counts, dict
        ):
            raise KeyError("fingerprint")
        if not isinstance(counts["planned"] + counts["fragments"], int):
            raise KeyError("counts")
    except MissingFileError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunMismatchError(f"{uri}: not written by this version of segray; choose another --output") from error
    return dict(content)


def get_plan(run: dict[str, Any]) -> Plan:
    """Return what ``run.json`` says of the run's plan."""
    counts = run["counts"]
    fingerprint = run["fingerprint"]
    return Plan(fingerprint["plan_sha256"], fingerprint["cut_sha256"], counts["planned"], counts["fragments"])


def require_same_model(run: dict[str, Any], bundle_sha256: str, config: dict[str, Any], output_uri: str) -> None:
    """Refuse to go on with a folder that another model or configuration began.

    Raises:
        RunMismatchError: Names all that differs.
    """
    theirs = run["fingerprint"]
    differences = [] if theirs["bundle_sha256"] == bundle_sha256 else ["another bundle"]
    differences += find_differences(theirs["config"], config, "segment")
    if differences:
        raise refuse(output_uri, "; ".join(differences))


def require_same_plan(output_uri: str, plan: Plan) -> None:
    """Refuse to finish a run whose plan another call has brought up to date meanwhile (``segment.retry_errors``).

    Raises:
        RunMismatchError: It has.
    """
    run = read_run(output_uri)
    if run is None or get_plan(run) != plan:
        raise RunMismatchError(f"{output_uri}: another call has taken up mended images meanwhile; call again")


def refuse(output_uri: str, difference: str, way_on: str = "") -> RunMismatchError:
    """Return the error for a folder that belongs to another run."""
    return RunMismatchError(
        f"{output_uri} holds a run of something else ({difference}); {way_on}choose another --output"
    )


def format_run(fingerprint: Fingerprint, plan: Plan, inputs: dict[str, Any], status: str, **counts: Any) -> bytes:
    """Return the content of ``run.json``; the same for the same call, whoever makes it."""
    content = {
        "fingerprint": {
            "bundle_sha256": fingerprint.bundle_sha256,
            "config": fingerprint.config,
            "plan_sha256": plan.sha256,
            "cut_sha256": plan.cut_sha256,
        },
        "inputs": inputs,
        "versions": get_library_versions(),
        "status": status,
        "counts": {"planned": plan.num_images, "fragments": plan.num_fragments, **counts},
    }
    return json.dumps(content, indent=2).encode()


def warn_of_other_versions(run: dict[str, Any], console: Console) -> None:
    """Say if a run goes on with other libraries than it began with: its rows need not have the same bits then."""
    mine = get_library_versions()
    changed = [
        f"{name} {there} there, {mine.get(name)} here"
        for name, there in run["versions"].items()
        if mine.get(name) != there
    ]
    if changed:
        console.print(
            f"warning: the run began with other versions ({', '.join(changed)}); the bits of rows made now may differ",
            highlight=False,
        )


def write_if_changed(uri: str, content: bytes) -> None:
    """Store a file unless it has this content already."""
    try:
        if read_bytes(uri) == content:
            return
    except MissingFileError:
        pass
    write_bytes(uri, content)
