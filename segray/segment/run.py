"""A run folder and its fingerprint: what was planned, with which model and settings, and how it ended."""

import json
from dataclasses import dataclass
from typing import Any

from segray.bundle import get_library_versions
from segray.config import find_differences
from segray.errors import MissingFileError, RunMismatchError
from segray.storage import join_uri, read_bytes, write_bytes


@dataclass(frozen=True)
class Fingerprint:
    """What decides every byte of a run's rows."""

    bundle_sha256: str
    config: dict[str, Any]
    plan_sha256: str


def get_run_uri(output_uri: str) -> str:
    """Return where a run's ``run.json`` is."""
    return join_uri(output_uri, "run.json")


def read_run(output_uri: str) -> dict[str, Any] | None:
    """Return the content of ``run.json``, or None if nothing ran here yet."""
    try:
        content: dict[str, Any] = json.loads(read_bytes(get_run_uri(output_uri)))
    except MissingFileError:
        return None
    except ValueError as error:
        raise RunMismatchError(f"{get_run_uri(output_uri)}: not JSON; choose another output") from error
    return content


def require_same_run(run: dict[str, Any] | None, mine: Fingerprint, output_uri: str, *, has_rows: bool) -> None:
    """Refuse to go on with a folder that another model, configuration or listing began.

    Raises:
        RunMismatchError: Names what differs, or that rows lie there of which nothing is known.
    """
    if run is None:
        if has_rows:
            raise RunMismatchError(f"{output_uri} holds rows but no run.json to say of what; choose another --output")
        return
    theirs = run.get("fingerprint", {})
    differences = []
    if theirs.get("bundle_sha256") != mine.bundle_sha256:
        differences.append("another bundle")
    differences += find_differences(theirs.get("config", {}), mine.config, "segment")
    if not differences and theirs.get("plan_sha256") != mine.plan_sha256:
        differences.append("another listing: images or masks were added, removed or resized, or the URI differs")
    if differences:
        raise RunMismatchError(
            f"{output_uri} holds a run of something else ({'; '.join(differences)}); choose another --output"
        )


def save_run(output_uri: str, fingerprint: Fingerprint, inputs: dict[str, str | None], **outcome: Any) -> None:
    """Write ``run.json``."""
    content = {
        "fingerprint": {
            "bundle_sha256": fingerprint.bundle_sha256,
            "config": fingerprint.config,
            "plan_sha256": fingerprint.plan_sha256,
        },
        "inputs": inputs,
        "versions": get_library_versions(),
        **outcome,
    }
    write_if_changed(get_run_uri(output_uri), json.dumps(content, indent=2).encode())


def write_if_changed(uri: str, content: bytes) -> None:
    """Store a file unless it has this content already."""
    try:
        if read_bytes(uri) == content:
            return
    except MissingFileError:
        pass
    write_bytes(uri, content)
