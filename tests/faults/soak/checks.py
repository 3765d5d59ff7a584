"""Checks of a soak: every image is one row of the expected kind, and rows equal those of a run without faults."""

import json
import random
from collections import Counter

import numpy as np

from segray.errors import MissingFileError
from segray.storage import join_uri, list_names, read_bytes, read_columns
from tests.faults.soak.images import ImageSet

_MAX_PROBLEMS = 20


def list_fragments(output_uri: str) -> list[str]:
    """Return the names of the fragments' files that are written so far, in order."""
    return sorted(name for name in list_names(join_uri(output_uri, "images")) if name.endswith(".parquet"))


def check_rows(images: ImageSet, images_uri: str, output_uri: str) -> tuple[dict[str, int], list[str]]:
    """Compare the rows of a run with the images.

    Returns:
        The number of rows by ``error_kind``, or ``ok``; and what is wrong, one line each, at most 20.
    """
    missing = {join_uri(images_uri, image.key): image.kind for image in images.iterate()}
    found: Counter[str] = Counter()
    problems = _check_record(output_uri, images.num_images)
    for name in list_fragments(output_uri):
        table = read_columns(join_uri(output_uri, "images", name), ["uri", "status", "error_kind", "error_message"])
        for row in table.to_pylist():
            uri, kind = row["uri"], row["error_kind"]
            found[kind or row["status"]] += 1
            if uri not in missing:
                problems.append(f"{name}: {uri} is not an image, or has a row already")
            elif (expected := missing.pop(uri)) != kind:
                problems.append(f"{name}: {uri}: expected {expected}, got {kind}: {row['error_message']}")
    problems += [f"{uri} has no row" for uri in missing]
    return dict(found), problems[:_MAX_PROBLEMS]


def _check_record(output_uri: str, num_images: int) -> list[str]:
    try:
        record = json.loads(read_bytes(join_uri(output_uri, "run.json")))
    except MissingFileError as error:
        return [str(error)]
    status, counts = record["status"], record["counts"]
    if (status, counts["planned"]) != ("complete", num_images):
        return [f"run.json: {status}, {counts}; expected complete, {num_images} planned images"]
    return []


def check_summary(output_uri: str) -> list[str]:
    """Compare the summary's pixels of each class with the sums over all rows; return what is wrong."""
    summarized = read_columns(join_uri(output_uri, "summary.parquet"), ["pixel_count"])["pixel_count"].to_pylist()
    summed = np.zeros(len(summarized), np.int64)
    for name in list_fragments(output_uri):
        counts = read_columns(join_uri(output_uri, "images", name), ["pixel_count"])["pixel_count"]
        summed += counts.combine_chunks().flatten().to_numpy().reshape(-1, len(summarized)).sum(0)  # Without nulls.
    if summed.tolist() == summarized:
        return []
    return [f"summary.parquet has {summarized} pixels of the classes, the rows have {summed.tolist()}"]


def choose_fragments(output_uri: str, count: int, fragment_size: int) -> tuple[list[str], list[str]]:
    """Return the names of some full fragments' files, in order, and the URIs of all their images, in order."""
    names = list_fragments(output_uri)
    chosen, uris = [], []
    for name in sorted(random.Random(0).sample(names, min(count, len(names)))):
        in_fragment = read_columns(join_uri(output_uri, "images", name), ["uri"])["uri"].to_pylist()
        if len(in_fragment) == fragment_size:  # Not the last fragment of all.
            chosen.append(name)
            uris += in_fragment
    return chosen, uris


def compare_fragments(output_uri: str, chosen: list[str], calm_uri: str) -> list[str]:
    """Compare the bytes of chosen fragments with those of a run without faults over their images only."""
    calm = list_fragments(calm_uri)
    if len(calm) != len(chosen):
        return [f"the run without faults has {len(calm)} fragments, expected {len(chosen)}"]
    problems = []
    for name, other in zip(chosen, calm, strict=True):
        if read_bytes(join_uri(output_uri, "images", name)) != read_bytes(join_uri(calm_uri, "images", other)):
            problems.append(f"{name} differs from {other} of the run without faults")
    return problems[:_MAX_PROBLEMS]
