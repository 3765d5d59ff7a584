"""Key-value metadata in the Parquet schema of each fragment's file: what the rows mean, and how they were computed."""

import json
from collections.abc import Mapping
from typing import Any

from segray.data.classes import ClassMap
from segray.runs.run_file import FORMAT_VERSION

FORMAT_VERSION_KEY = "segray.format_version"
CLASS_NAMES_KEY = "segray.class_names"  # JSON list
CLASS_VALUES_KEY = "segray.class_values"  # JSON list: the value of each class in mask files
BUNDLE_SHA256_KEY = "segray.bundle_sha256"
COMPUTED_WITH_KEY = "segray.computed_with"  # JSON object: ``SegmentSettings.bit_settings``


def build_fragment_metadata(
    classes: ClassMap, bundle_sha256: str, computed_with: Mapping[str, Any]
) -> dict[bytes | str, bytes | str]:
    """Return the metadata of the files that a run writes; the same settings give the same bytes.

    Args:
        classes: Classes of the model.
        bundle_sha256: sha256 of the bundle's manifest.
        computed_with: Settings that may change the last bits of the rows.
    """
    return {
        FORMAT_VERSION_KEY: str(FORMAT_VERSION),
        CLASS_NAMES_KEY: json.dumps(classes.names),
        CLASS_VALUES_KEY: json.dumps(classes.values),
        BUNDLE_SHA256_KEY: bundle_sha256,
        COMPUTED_WITH_KEY: json.dumps(computed_with, sort_keys=True),
    }
