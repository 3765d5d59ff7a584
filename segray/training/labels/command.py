"""Check labels before training; ``segray check`` runs this check alone."""

from collections.abc import Sequence

from rich.console import Console

from segray.config import TrainConfig
from segray.data.classes import ClassMap
from segray.data.manifest import Unpaired, load_splits
from segray.data.sample_list import Sample, Splits
from segray.progress import build_bar
from segray.runtime.connect import connect_ray
from segray.storage import join_uri, normalize_uri, write_bytes
from segray.training.job import get_classes
from segray.training.labels.inspect import (
    ReportBuilder,
    SplitReport,
    check_dataset,
    complete_reports,
    require_labelled,
)
from segray.training.labels.record import LabelRecord, remove_record
from segray.training.labels.report import LabelReport, print_findings


def check_labels(samples: Sequence[Sample], classes: ClassMap, split: str, console: Console) -> SplitReport:
    """Check the labels of one split and show progress; return the report."""
    with build_bar(console, "images") as bar:
        task = bar.add_task(f"check {split}", total=len(samples), note="")

        def show(builder: ReportBuilder) -> None:
            bar.update(task, completed=builder.num_samples, note=f"{builder.num_faults} faults")

        return check_dataset(samples, classes, show)


def check_splits(splits: Splits, classes: ClassMap, console: Console) -> dict[str, SplitReport]:
    """Check the labels of all splits; return the reports by split name."""
    reports = {name: check_labels(samples, classes, name, console) for name, samples in splits._asdict().items()}
    return complete_reports(reports, splits, classes)


def check_config(config: TrainConfig, console: Console) -> LabelReport:
    """Check the labels of all splits of a configuration, and show progress.

    If there are no faults, the output folder gets a record, and training on the same files does not check them again.

    Raises:
        DataError: The images and masks cannot be listed or paired.
        StorageError: Environment error: permissions, network or disk.
    """
    return _check(config, console)[0]


def _check(config: TrainConfig, console: Console) -> tuple[LabelReport, Splits]:
    unpaired: list[Unpaired] = []
    splits = load_splits(config.data, unpaired)
    classes = get_classes(config)
    with connect_ray():
        report = LabelReport(check_splits(splits, classes, console), unpaired, classes)
    output = normalize_uri(config.output)
    if report.ok and all(split.pixel_count.any() for split in report.splits.values()):
        LabelRecord.of(report.splits, splits.compute_sha256(), classes).write(output)
    else:
        remove_record(output)
    return report, splits


def run_check(
    config: TrainConfig,
    console: Console,
    *,
    list_all: bool = False,
    num_drawn: int | None = None,
    draw_to: str | None = None,
) -> bool:
    """Check all labels, print the findings and the labelled pixels of each class; return whether there are no faults.

    Args:
        config: Where the labels are, and what their values mean.
        console: Where the findings are printed.
        list_all: List every finding, not only the first hundred of a kind.
        num_drawn: Number of augmented training samples to draw if there are no faults.
        draw_to: URI of that picture; None writes ``augmented.png`` under the output.

    Raises:
        SegrayError: The images and masks cannot be listed or paired, no pixel of a split is labelled, or storage
            cannot be accessed.
    """
    report, splits = _check(config, console)
    print_findings(report, console, list_all)
    if not report.ok:
        return False
    for name, split in report.splits.items():
        require_labelled(split, name)
    if num_drawn:
        uri = normalize_uri(draw_to) if draw_to else join_uri(normalize_uri(config.output), "augmented.png")
        _draw_samples(config, splits, report.classes, num_drawn, uri)
        console.print(f"augmented samples: {uri}", highlight=False)
    return True


def _draw_samples(config: TrainConfig, splits: Splits, classes: ClassMap, num_drawn: int, uri: str) -> None:
    from segray.training.labels.preview import draw_training  # It imports matplotlib.

    write_bytes(uri, draw_training(config, splits.train, classes, num_drawn))
