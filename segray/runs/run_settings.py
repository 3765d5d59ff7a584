"""Settings that ``run.json`` records, and which of them a later call on the same folder may change.

- Row settings (``SegmentSettings.row_settings``, and whether there is ground truth) never change.
- Bit settings (``SegmentSettings.bit_settings``) change only with ``segment.allow_mixed``.
- Limits (``SegmentSettings.limits``) only grow, and only with ``segment.retry_errors``, so that no error row of the
  lower limit stays.
- All other settings may change: they are not recorded.

A setting that a folder does not record, because it was added later, counts as its default. So the default of a recorded
setting must not change without a new format version.
"""

from collections.abc import Mapping
from typing import Any

from segray.config import SegmentSettings, find_differences
from segray.errors import RunMismatchError
from segray.runs.fingerprint import build_mismatch_error

_SECTION = "segment"
_MIXED_REMEDY = (
    "rows written now may differ from earlier ones in their last bits; to accept this, rerun with "
    "--set segment.allow_mixed=true"
)
_LIMITS_REMEDY = "to process the error rows again with other limits, rerun with --set segment.retry_errors=true"
_CUT_SETTINGS = {"fragment_size", "fragment_bytes"}  # Recorded by format 1; they do not change the rows.


def get_recorded_defaults() -> dict[str, Any]:
    """Return the default of every setting that ``run.json`` records."""
    settings = SegmentSettings()
    return {**settings.row_settings, "ground_truth": False, **settings.bit_settings, **settings.limits}


def fill_in_defaults(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings, with defaults for those of ``current`` that were added after they were recorded."""
    defaults = get_recorded_defaults()
    return {**{name: defaults[name] for name in current}, **recorded}


def require_known_settings(recorded: Mapping[str, Any], current: Mapping[str, Any], output_uri: str) -> None:
    """Raise if a later version of segray added a recorded setting.

    Args:
        recorded: Settings that the folder records.
        current: The same kind of settings of this call, which has all that this version of segray knows.
        output_uri: The folder, for the message.

    Raises:
        RunMismatchError: A recorded setting is unknown; names each of them.
    """
    if unknown := sorted(recorded.keys() - current.keys()):
        raise build_mismatch_error(
            output_uri,
            [f"this version of segray has no setting {_SECTION}.{name}: {recorded[name]!r}" for name in unknown],
            "upgrade segray",
        )


def require_allowed_changes(
    bits: Mapping[str, Any], limits: Mapping[str, Any], settings: SegmentSettings, output_uri: str
) -> list[str]:
    """Compare the bit settings and limits of a run with those of this call.

    Args:
        bits: Recorded bit settings that the run was last computed with.
        limits: Recorded limits.
        settings: Settings of this call.
        output_uri: The folder, for the message.

    Returns:
        The changes of bit settings that ``allow_mixed`` allows, one phrase each.

    Raises:
        RunMismatchError: A change is not allowed; names each of them, and the setting that allows it.
    """
    mixed = find_differences(fill_in_defaults(bits, settings.bit_settings), settings.bit_settings, _SECTION)
    limits = fill_in_defaults(limits, settings.limits)
    changed = find_differences(limits, settings.limits, _SECTION)
    is_lowered = any(settings.limits[name] < value for name, value in limits.items())
    refused: list[str] = []
    if mixed and not settings.allow_mixed:
        refused += [*mixed, _MIXED_REMEDY]
    if is_lowered or (changed and not settings.retry_errors):
        refused += [*changed, "limits can be raised but not lowered" if is_lowered else _LIMITS_REMEDY]
    if refused:
        raise RunMismatchError(
            f"{output_uri}: {'; '.join(refused)}; otherwise restore the setting, or choose another --output"
        )
    return mixed


def upgrade_format_1(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a ``run.json`` of format 1 in the layout of format 2.

    In format 1 all settings were part of the fingerprint, including those that divide the images into fragments.
    Content that is not valid is left for validation.
    """
    fingerprint = content.get("fingerprint")
    if not isinstance(fingerprint, dict) or not isinstance(fingerprint.get("config"), dict):
        return content
    config = fingerprint["config"]
    defaults = SegmentSettings()
    bits = {name: config.get(name, default) for name, default in defaults.bit_settings.items()}
    limits = {name: config.get(name, default) for name, default in defaults.limits.items()}
    moved = {*bits, *limits, *_CUT_SETTINGS}
    rows = {name: value for name, value in config.items() if name not in moved}
    return {
        **content,
        "format_version": 2,
        "fingerprint": {**fingerprint, "config": rows},
        "computed_with": [bits],
        "limits": limits,
    }
