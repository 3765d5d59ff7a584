"""Check labels before training; ``segray check`` runs this check alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from rich.console import Console

from segray.config import DataConfig, OxfordPetLayout, TrainConfig
from segray.data.classes import ClassMap
from segray.data.manifest import (
    Unpaired,
    compute_folds_sha256,
    describe_groups,
    join_folds,
    load_folds,
    load_splits,
    name_images,
)
from segray.data.sample_list import Sample, Splits
from segray.progress import build_bar
from segray.runtime.connect import connect_ray
from segray.storage import join_uri, normalize_uri, write_bytes
from segray.training.job import get_classes
from segray.training.labels.inspect import (
    LabelFault,
    ReportBuilder,
    SplitReport,
    WarningKind,
    check_dataset,
    complete_reports,
    require_labelled,
    sum_reports,
)
from segray.training.labels.name_groups import suspect_groups
from segray.training.labels.record import LabelRecord, remove_record
from segray.training.labels.report import LabelReport, print_findings


def check_labels(samples: Sequence[Sample], classes: ClassMap, split: str, console: Console) -> SplitReport:
    """Check the labels of one split and show progress; return the report."""
    with build_bar(console, "images") as bar:
        task = bar.add_task(f"check {split}", total=len(samples), note="")

        def show(builder: ReportBuilder) -> None:
            bar.update(task, completed=builder.num_samples, note=f"{builder.num_faults} faults")

        return check_dataset(samples, classes, show)


def check_splits(config: TrainConfig, splits: Splits, console: Console) -> dict[str, SplitReport]:
    """Check the labels of all splits; return the reports by split name."""
    classes = get_classes(config)
    reports = {name: check_labels(samples, classes, name, console) for name, samples in splits._asdict().items()}
    reports = complete_reports(reports, splits, classes)
    suspicion = suspect_shared_groups(config.data, splits)
    return {**reports, "val": replace(reports["val"], warnings=suspicion + reports["val"].warnings)}


def check_folds(config: TrainConfig, folds: Sequence[Sequence[Sample]], console: Console) -> dict[str, SplitReport]:
    """Check the labels of all folds of a cross-validation; return the reports by name, ``fold 1`` and so on.

    Warnings about what train and val share are those of each fold held out for validation.
    """
    classes = get_classes(config)
    found = [check_labels(samples, classes, f"fold {number}", console) for number, samples in enumerate(folds, start=1)]
    reports = {}
    for number, report in enumerate(found):
        others = [index for index in range(len(folds)) if index != number]
        # In the order of the reports, whose digests are those of the images.
        splits = Splits([sample for index in others for sample in folds[index]], list(folds[number]))
        pair = {"train": sum_reports([found[index] for index in others]), "val": report}
        report = complete_reports(pair, splits, classes)["val"]
        suspicion = [] if number else suspect_shared_groups(config.data, splits)
        reports[f"fold {number + 1}"] = replace(report, warnings=suspicion + report.warnings)
    return reports


def suspect_shared_groups(data: DataConfig, splits: Splits) -> list[LabelFault]:
    """Return a warning if the names suggest that groups, such as videos, are in train and in val; else an empty list.

    Nothing is suspected if ``data.val.group_by`` says what the groups are, or the layout defines the splits.
    """
    if isinstance(data.layout, OxfordPetLayout) or (data.val is not None and data.val.group_by is not None):
        return []
    shared = suspect_groups(*(name_images(data, samples) for samples in splits))
    if shared is None:
        return []
    group, num_train, num_val = shared.example
    message = (
        f"one of {shared.num_val:,} images in val whose names suggest groups that are in train too, such as {group!r} "
        f"with {num_train:,} images in train and {num_val:,} in val"
    )
    remedy = (
        "if a group is a video, scene or patient, the validation score is too high, because it rewards memorising: "
        f"set data.val: {{fraction: 0.2, group_by: '{shared.expression}'}}"
    )
    return [LabelFault(splits.val[shared.first].image_uri, WarningKind.SHARED_GROUP, message, remedy)]


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
    classes = get_classes(config)
    check: Callable[[], dict[str, SplitReport]]
    if config.train.folds is not None:
        folds = load_folds(config.data, config.train.folds, unpaired)
        splits, listing = join_folds(folds), compute_folds_sha256(folds)
        check = partial(check_folds, config, folds, console)
    else:
        splits = load_splits(config.data, unpaired)
        listing = splits.compute_sha256()
        check = partial(check_splits, config, splits, console)
        for line in describe_groups(config.data, splits):
            console.print(line, highlight=False)
    with connect_ray():
        report = LabelReport(check(), unpaired, classes)
    output = normalize_uri(config.output)
    if report.ok and all(split.pixel_count.any() for split in report.splits.values()):
        LabelRecord.of(report.splits, listing, classes).write(output)
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
