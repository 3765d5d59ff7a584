"""Result of a label check, and how it is printed: a line per file, labelled pixels, and each kind with its remedy."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from segray.data.classes import ClassMap
from segray.data.manifest import Unpaired
from segray.training.labels.split_report import LabelFault, SplitReport, sum_counts

_MAX_LISTED = 100  # Findings of one kind with one remedy.
_MAX_TRAIN_WARNINGS = 3  # At least; more if there are more kinds.

Finding = LabelFault | Unpaired


@dataclass(frozen=True)
class LabelReport:
    """Result of a label check.

    Attributes:
        splits: Report of each split, ``train`` and ``val``, or of each fold of a cross-validation: labelled pixels,
            faults and warnings.
        unpaired: Images without a mask, and masks without an image.
        classes: The classes that the masks were read with.
    """

    splits: Mapping[str, SplitReport]
    unpaired: Sequence[Unpaired]
    classes: ClassMap

    @property
    def faults(self) -> list[Finding]:
        """Every file that training cannot use, with ``uri``, ``kind``, ``message`` and ``remedy``."""
        return [*self.unpaired, *(fault for report in self.splits.values() for fault in report.faults)]

    @property
    def warnings(self) -> list[Finding]:
        """Every file that training can use but whose content may be unintended."""
        return _collect_warnings(self.splits)

    @property
    def ok(self) -> bool:
        """Whether there are no faults; warnings do not count."""
        return not self.faults


def print_findings(report: LabelReport, console: Console, list_all: bool = False) -> None:
    """Print each warning and fault, then the labelled pixels, then each kind of finding with its count and remedy.

    Args:
        report: The report.
        console: Where the findings are printed.
        list_all: Print a line for every finding, not only for the first 100 of one kind with one remedy.
    """
    reports, faults = report.splits, report.faults
    found = {"warning: ": report.warnings, "": faults}
    limit = None if list_all else _MAX_LISTED
    for prefix, findings in found.items():
        _list(findings, prefix, limit, console)
    console.print(_build_table(reports, report.classes))
    for prefix, findings in found.items():
        for (kind, remedy), count in Counter(map(_get_group, findings)).most_common():
            cut = f" (first {limit} listed; use --all to list every file)" if limit and count > limit else ""
            console.print(f"{count:,} x {prefix}{kind}: {remedy}{cut}", highlight=False)
    num_samples = sum(split.num_samples for split in reports.values())
    totals = f"{len(faults)} faults, {len(found['warning: '])} warnings"
    console.print(f"{num_samples} images and masks checked, {totals}", highlight=False)


def print_warnings(reports: Mapping[str, SplitReport], console: Console) -> None:
    """Print three warnings, or the first one of each kind if there are more kinds, and how many more there are."""
    ranked, counts = [], Counter[tuple[str, str]]()
    for warning in _collect_warnings(reports):
        ranked.append((counts[_get_group(warning)], warning))
        counts[_get_group(warning)] += 1
    warnings = [warning for _, warning in sorted(ranked, key=lambda pair: pair[0])]
    num_shown = max(_MAX_TRAIN_WARNINGS, len(counts))
    _list(warnings[:num_shown], "warning: ", None, console)
    if len(warnings) > num_shown:
        num_more = len(warnings) - num_shown
        console.print(f"warning: and {num_more:,} more (segray check lists all)", highlight=False)


def _collect_warnings(reports: Mapping[str, SplitReport]) -> list[Finding]:
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


def _build_table(reports: Mapping[str, SplitReport], classes: ClassMap) -> Table:
    if reports.keys() != {"train", "val"}:  # There may be a hundred folds.
        reports = {"": sum_counts(reports.values())}
    table = Table("class", "raw value")
    for name in reports:
        for what in ("pixels", "share", "images"):
            table.add_column(f"{name} {what}".strip(), justify="right")
    for index, (class_name, value) in enumerate(zip(classes.names, classes.values, strict=True)):
        cells = [cell for report in reports.values() for cell in _describe_class(report, index)]
        table.add_row(class_name, str(value), *cells)
    ignored = [cell for report in reports.values() for cell in (f"{report.ignored_px:,}", "", "")]
    table.add_row("(ignored)", ", ".join(map(str, classes.ignore_values)), *ignored)
    return table


def _describe_class(report: SplitReport, index: int) -> tuple[str, str, str]:
    num_px = int(report.pixel_count[index])
    share = num_px / max(1, int(report.pixel_count.sum()))
    return f"{num_px:,}", f"{share:.2%}", str(report.image_count[index])
