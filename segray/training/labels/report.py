"""What a label check found, for people: a line for each file, what is labelled, and each kind with what mends it."""

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from segray.data.classes import ClassMap
from segray.data.manifest import Unpaired
from segray.training.labels.inspect import LabelFault, LabelReport

_MAX_LISTED = 100  # of one kind with one remedy
_MAX_TRAIN_WARNINGS = 3

Finding = LabelFault | Unpaired


def print_findings(
    reports: Mapping[str, LabelReport],
    faults: Sequence[Finding],
    classes: ClassMap,
    console: Console,
    list_all: bool = False,
) -> None:
    """Print each warning and fault, then what is labelled, then each kind of finding with its count and remedy.

    Args:
        reports: By split.
        faults: Those of the reports, and what else was found.
        classes: The classes of the reports.
        console: What is printed to.
        list_all: Print a line for each finding also where very many are of one kind with one remedy.
    """
    found = {"warning: ": _collect_warnings(reports), "": faults}
    limit = None if list_all else _MAX_LISTED
    for prefix, findings in found.items():
        _list(findings, prefix, limit, console)
    console.print(_build_table(reports, classes))
    for prefix, findings in found.items():
        for (kind, remedy), count in Counter(map(_get_group, findings)).most_common():
            cut = f" (the first {limit} are listed; --all lists them)" if limit and count > limit else ""
            console.print(f"{count:,} x {prefix}{kind}: {remedy}{cut}", highlight=False)
    num_samples = sum(report.num_samples for report in reports.values())
    totals = f"{len(faults)} faults, {len(found['warning: '])} warnings"
    console.print(f"{num_samples} images and masks checked, {totals}", highlight=False)


def print_warnings(reports: Mapping[str, LabelReport], console: Console) -> None:
    """Print the first warnings, and how many more there are."""
    warnings = _collect_warnings(reports)
    _list(warnings[:_MAX_TRAIN_WARNINGS], "warning: ", None, console)
    if len(warnings) > _MAX_TRAIN_WARNINGS:
        num_more = len(warnings) - _MAX_TRAIN_WARNINGS
        console.print(f"warning: and {num_more:,} more (segray check lists all)", highlight=False)


def _collect_warnings(reports: Mapping[str, LabelReport]) -> list[Finding]:
    return [warning for report in reports.values() for warning in report.warnings]


def _get_group(finding: Finding) -> tuple[str, str]:
    return finding.kind, finding.remedy


def _list(findings: Sequence[Finding], prefix: str, limit: int | None, console: Console) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        group = _get_group(finding)
        counts[group] += 1
        if limit is None or counts[group] <= limit:
            console.print(f"{prefix}{finding}", highlight=False)


def _build_table(reports: Mapping[str, LabelReport], classes: ClassMap) -> Table:
    table = Table("class", "raw value")
    for name in reports:
        for what in ("pixels", "share", "images"):
            table.add_column(f"{name} {what}", justify="right")
    for index, (class_name, value) in enumerate(zip(classes.names, classes.values, strict=True)):
        cells = [cell for report in reports.values() for cell in _describe_class(report, index)]
        table.add_row(class_name, str(value), *cells)
    ignored = [cell for report in reports.values() for cell in (f"{report.ignored_px:,}", "", "")]
    table.add_row("(ignored)", ", ".join(map(str, classes.ignore_values)), *ignored)
    return table


def _describe_class(report: LabelReport, index: int) -> tuple[str, str, str]:
    num_px = int(report.pixel_count[index])
    share = num_px / max(1, int(report.pixel_count.sum()))
    return f"{num_px:,}", f"{share:.2%}", str(report.image_count[index])
