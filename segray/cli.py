"""The ``segray`` command: one function per verb, which the files under ``jobs/`` also run.

Modules that import torch or Ray are imported inside the verbs, so that wrong arguments are reported without delay.
"""

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from segray.config import ExportFormat, SegmentFile, TrainConfig, load_config, require_absolute
from segray.errors import ConfigError, SegrayError, flatten_message
from segray.progress import build_console
from segray.runtime.connect import is_submitted_job
from segray.runtime.failures import find_segray_error

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a segmentation model on labelled images and apply it to a whole bucket, distributed with Ray.",
)
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Path or URI of the configuration file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one setting of the configuration, for example train.num_epochs=3. May be repeated.",
    ),
]


def _print_version(is_requested: bool) -> None:
    if is_requested:
        print(f"segray {version('segray')}")
        raise typer.Exit


@app.callback()
def handle_common_options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Handle the options that come before the verb."""


@app.command()
def train(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Train a model on labelled images and write a model bundle. To resume, rerun the same command."""
    settings = load_config(TrainConfig, config, overrides or [])
    if is_submitted_job():
        require_absolute(settings.uris)
    console = build_console()
    from segray.training.folds.run import run_folds_and_training

    console.print(f"bundle: {run_folds_and_training(settings, console)}", highlight=False)


@app.command()
def tune(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Search for the best settings (section tune) and write that configuration. To resume, rerun the same command."""
    settings = load_config(TrainConfig, config, overrides or [])
    if is_submitted_job():
        require_absolute(settings.uris)
    console = build_console()
    from segray.training.tuning.search import run_search

    best = run_search(settings, console).config_uri
    console.print(f"best configuration: {best} (to train a bundle with it, run segray train)", highlight=False)


@app.command()
def segment(
    bundle: Annotated[str, typer.Option(metavar="URI", help="Model bundle written by segray train.")],
    images: Annotated[
        list[str],
        typer.Option(
            metavar="URI",
            help="Images: a folder or prefix, a glob, a single image, a .txt list of URIs, or a .csv or .parquet "
            "manifest. May be repeated.",
        ),
    ],
    output: Annotated[
        str, typer.Option(metavar="URI", help="Folder to write the results to. Each run needs a folder of its own.")
    ],
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG.yaml", help="Path or URI of a configuration; only its section segment is used."),
    ] = None,
    masks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URI",
            help="Ground-truth masks to score against, paired with the images by name. One per --images, in order.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN",
            help="The --output of an earlier run: images that it has segmented, and that have not changed since, are "
            "left out. May be repeated.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Segment only the first N images, rounded up to whole fragments, as a trial. To segment the others "
            "too, rerun without it.",
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Print the time per stage, the bottleneck, and which setting to change."),
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Segment images and write one Parquet row per image. To resume, rerun the same command.

    Exit code 3: too many images are error rows. Exit code 4: environment error (permissions, network, disk). Exit code
    5: stopped early, because most images are error rows.
    """
    settings = load_config(SegmentFile, config, overrides or []).segment
    if is_submitted_job():
        require_absolute({"--bundle": bundle, "--output": output})
        for name, uris in (("--images", images), ("--masks", masks or ()), ("--exclude", exclude or ())):
            for uri in uris:
                require_absolute({name: uri})
    console = build_console()
    from segray.segmentation.driver import print_outcome, run_segmentation
    from segray.segmentation.error_limits import require_few_errors
    from segray.segmentation.job import SegmentJob

    job = SegmentJob(bundle, tuple(images), output, tuple(masks or ()), settings, tuple(exclude or ()), limit)
    outcome = run_segmentation(job, console, with_profile=profile)
    print_outcome(outcome, console)
    require_few_errors(outcome, settings)


@app.command()
def status(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="The --output folder of segray segment.")],
) -> None:
    """Show the progress of a segmentation run: images planned, done and remaining, errors by kind, rate."""
    console = build_console()
    from segray.results.status import print_status, read_status

    print_status(read_status(output), console)


@app.command()
def check(
    config: ConfigArgument,
    overrides: SetOption = None,
    list_all: Annotated[
        bool, typer.Option("--all", help="List every problem; the default is at most 100 of each kind.")
    ] = False,
    draw: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=32, help="Draw the first N training samples as training augments them."),
    ] = None,
    draw_to: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="PNG file for the drawn samples. Default: augmented.png in the configured output folder.",
        ),
    ] = None,
) -> None:
    """Check all images and masks of a training configuration and list every problem with its remedy.

    If there is none, labels.json in the configured output folder says so, and training does not check again. Exit code
    1 if there is any problem.
    """
    settings = load_config(TrainConfig, config, overrides or [])
    if is_submitted_job():
        require_absolute(settings.uris)
    if draw_to and not draw:
        raise ConfigError("--draw-to requires --draw N, the number of samples to draw")
    console = build_console()
    from segray.training.labels.command import run_check

    if not run_check(settings, console, list_all=list_all, num_drawn=draw, draw_to=draw_to):
        raise typer.Exit(1)


@app.command()
def export(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Model bundle written by segray train.")],
    export_format: Annotated[
        ExportFormat,
        typer.Option("--format", help="onnx: for ONNX Runtime and others. torch_export: for PyTorch without segray."),
    ],
    output: Annotated[
        str | None,
        typer.Option(metavar="URI", help="File to write. Default: model.onnx or model.pt2 in the bundle folder."),
    ] = None,
) -> None:
    """Export a model bundle to a single file that runs without segray, and compare its output with the bundle's."""
    console = build_console()
    from segray.models.export import export_bundle

    console.print(f"exported: {export_bundle(bundle, export_format, output)}", highlight=False)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for data and results; an earlier demo in it is replaced.")
    ] = Path("runs/demo"),
    only_data: Annotated[bool, typer.Option("--only-data", help="Only generate the labelled images.")] = False,
) -> None:
    """Generate labelled images of shapes, train a model on them, and segment and score test images."""
    console = build_console()
    from segray.demo import run_demo, run_demo_data

    if only_data:
        run_demo_data(output, console)
    else:
        run_demo(output, console)


def run(command: Callable[[], object]) -> NoReturn:
    """Call ``command`` and exit; a ``SegrayError`` becomes one line on standard error and its exit code."""
    try:
        command()
    except SegrayError as error:
        known = find_segray_error(error) or error
        print(f"error: {flatten_message(known)}", file=sys.stderr)
        sys.exit(known.exit_code)
    sys.exit(0)


def main() -> NoReturn:
    """Run the ``segray`` command with the arguments of the process."""
    run(app)


def run_job(verb: str) -> NoReturn:
    """Run ``segray VERB`` with the arguments of a job file."""
    run(lambda: app([verb, *sys.argv[1:]], prog_name=f"jobs/{verb}.py"))
