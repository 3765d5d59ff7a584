"""The documentation compared with the code: links, commands, settings, columns, errors, variables; the built site."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import typer
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config as load_mkdocs_config
from pydantic import BaseModel

from segray import errors, schema
from segray.cli import app
from segray.config import SegmentFile, TrainConfig
from segray.data.classes import ClassMap
from segray.errors import FaultKind, SegrayError
from segray.runs import fragment_metadata
from segray.runs.fragment_metadata import build_fragment_metadata

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = sorted([*OUTSIDE, *(ROOT / "benchmarks").glob("*.md"), *DOCS.rglob("*.md")])
MAX_README_LINES = 180


def get_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # @dataclass looks up the module there
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()


def find_code_blocks(text: str, *languages: str) -> list[str]:
    return [
        block for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages
    ]


def read_all() -> Iterator[tuple[Path, str]]:
    for path in PAGES:
        yield path, path.read_text()


def list_leaf_settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every setting that is not itself a section, from pydantic's JSON schema, independently of the hooks."""
    definitions = model.model_json_schema().get("$defs", {})

    def walk(node: dict[str, Any], path: str) -> Iterator[str]:
        options = node.get("anyOf", [node])
        sections = [option["$ref"] for option in options if "$ref" in option]
        if "additionalProperties" in node and isinstance(node["additionalProperties"], dict):
            inner = node["additionalProperties"]
            if "$ref" in inner:
                sections, path = [inner["$ref"]], f"{path}.<setting>"
        for reference in sections:
            section = definitions[reference.rpartition("/")[2]]
            for name, value in section["properties"].items():
                yield from walk(value, f"{path}.{name}")
        if not sections:
            yield path

    for name, value in model.model_json_schema()["properties"].items():
        yield from walk(value, name)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("path", [*OUTSIDE, *(ROOT / "benchmarks").glob("*.md")], ids=get_name)
def test_links_of_pages_outside_the_site_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    config = load_mkdocs_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build(config)
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?([^\">\s]+)", text)
        loaded += re.findall(
            r"<link[^>]*rel=\"?(?:stylesheet|preconnect|preload|icon)\"?[^>]*href=\"?([^\">\s]+)", text
        )
        loaded += re.findall(
            r"<link[^>]*href=\"?([^\">\s]+)\"?[^>]*rel=\"?(?:stylesheet|preconnect|preload|icon)", text
        )
        assert loaded
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))], page
        assert "<!-- generate:" not in text


def test_every_setting_is_in_the_reference_with_a_description() -> None:
    listed = {setting.name: setting for setting in hooks.list_settings()}
    assert listed.keys() >= set(list_leaf_settings(TrainConfig))
    text = hooks.render_settings()
    for name, setting in listed.items():
        assert f"| `{name}` |" in text
        assert setting.type, name
        assert setting.description, f"{name} has no description"


def test_every_command_and_option_is_in_the_reference() -> None:
    text = hooks.render_commands()
    commands: Any = typer.main.get_command(app)
    assert len(commands.commands) >= 7
    for name, command in commands.commands.items():
        _, _, section = text.partition(f"## `segray {name}`")
        section = section.partition("\n## ")[0]
        assert command.help.split(".")[0].split("\n")[0].replace("``", "`") in section
        for parameter in command.params:
            assert parameter.help, f"segray {name} {parameter.name}"
            spelling = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
            assert spelling.strip("[]") in section


@pytest.mark.parametrize("table", ["plan", "images", "summary"])
def test_every_column_is_in_the_reference_with_a_description(table: str) -> None:
    written = {"plan": schema.PLAN_SCHEMA, "images": schema.IMAGES_SCHEMA, "summary": schema.SUMMARY_SCHEMA}[table]
    described = hooks.load_column_descriptions()[table]
    assert list(described) == written.names
    assert all(described.values())
    assert f"<!-- generate: {table}_columns -->" in (DOCS / "reference/columns.md").read_text()


def test_every_key_of_the_schema_metadata_is_in_the_reference() -> None:
    keys = [value for name, value in vars(fragment_metadata).items() if name.endswith("_KEY")]
    assert len(keys) == 5
    text = (DOCS / "reference/columns.md").read_text()
    assert all(f"| `{key}` |" in text for key in keys)


def test_every_schema_is_in_the_reference() -> None:
    schemas = {name for name, value in vars(schema).items() if isinstance(value, pa.Schema)}
    assert schemas == {f"{name.upper()}_SCHEMA" for name in hooks.SCHEMAS}


def test_every_exit_code_and_error_kind_is_in_the_reference_and_in_troubleshooting() -> None:
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, SegrayError)]
    codes = {kind.exit_code for kind in kinds}
    reference, troubleshooting = (DOCS / "reference/errors.md").read_text(), (DOCS / "troubleshooting.md").read_text()
    for code in codes:
        assert f"\n| {code} |" in reference
        assert f"\n## Exit code {code}:" in troubleshooting
    assert set(re.findall(r"\n## Exit code (\d):", troubleshooting)) == {str(code) for code in codes}
    rendered = hooks.render_exceptions()
    assert all(f"| `{kind.__name__}` |" in rendered for kind in kinds)
    table = hooks.render_error_kinds().replace("`", "")
    for fault in FaultKind:
        assert f"| {fault.value} | {fault.description} | {fault.remedy} |" in table
    assert all("<!-- generate: error_kinds -->" in text for text in (reference, troubleshooting))


def test_every_environment_variable_is_in_the_reference() -> None:
    text = (DOCS / "reference/environment.md").read_text()
    named = set()
    for path in (ROOT / "segray").rglob("*.py"):
        code = path.read_text()
        named |= set(re.findall(r"\b((?:SEGRAY|RAY|AWS|MALLOC|MLFLOW|CUBLAS)_[A-Za-z0-9_]+)\b", code))
        named |= set(re.findall(r"environ(?:\.get|\.setdefault|\.pop)?[\[(]\"(\w+)\"", code))
    assert len(named) > 10
    assert not sorted(name for name in named if f"`{name}`" not in text)


def test_every_public_function_is_in_the_api_reference() -> None:
    text = (DOCS / "reference/api.md").read_text()
    public = importlib.import_module("segray").__all__
    assert not sorted(name for name in public if not re.search(rf"^::: segray\.[\w.]*\b{name}$", text, re.M))


def test_settings_named_in_the_pages_exist() -> None:
    sections = "data|model|loss|augmentation|train|tracking|tune|segment"
    known = {setting.name for setting in hooks.list_settings()}
    known |= {name.rpartition(".")[0] for name in known}
    for path, text in read_all():
        for name in re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)(?=[`=: ,;)]|$)", text, re.M):
            if not name.endswith((".py", ".json", ".csv", ".yaml", ".parquet", ".safetensors", ".onnx", ".pt2")):
                assert name in known, f"{get_name(path)}: {name}"


def test_commands_and_options_named_in_the_pages_exist() -> None:
    commands: Any = typer.main.get_command(app)
    options = {
        name: {opt for parameter in command.params for opt in parameter.opts if opt.startswith("--")}
        for name, command in commands.commands.items()
    }
    num_found = 0
    for path, text in read_all():
        for block in find_code_blocks(text, "", "bash", "text"):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.search(r"(?:^|\s)(?:segray|python jobs/)\s?(\w+)(?:\.py)?\s(.*)", line.partition("  #")[0])
                if match and not line.startswith(("drew", "segray trains")):
                    num_found += 1
                    assert match[1] in options, f"{get_name(path)}: {line}"
                    used = set(re.findall(r"(?<!\S)--[a-z-]+", match[2]))
                    assert used <= options[match[1]] | {"--help"}, f"{get_name(path)}: {line}"
    assert num_found > 15


def test_make_targets_named_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path, text in read_all():
        for target in re.findall(r"(?:`|^\$ |^)make ([a-z-]+)", text, re.M):
            assert target in targets, f"{get_name(path)}: make {target}"


def find_yaml_examples() -> list[Any]:
    blocks = [(get_name(path), block) for path, text in read_all() for block in find_code_blocks(text, "yaml")]
    return [pytest.param(block, id=f"{name}-{number}") for number, (name, block) in enumerate(blocks)]


@pytest.mark.parametrize("block", find_yaml_examples())
def test_yaml_examples_are_accepted(block: str) -> None:
    included = re.fullmatch(r'--8<-- "(.*)"\n', block)
    values = yaml.safe_load((ROOT / included[1]).read_text() if included else block)
    kind = TrainConfig if "data" in values else SegmentFile
    assert kind.model_validate(values)


def test_python_examples_compile() -> None:
    num_found = 0
    for path, text in read_all():
        for block in find_code_blocks(text, "python"):
            num_found += 1
            compile(block, get_name(path), "exec")
    assert num_found > 5


@pytest.fixture
def segmented(tmp_path: Path) -> Path:
    """A run folder with one ok row and one error row, for the examples that read results."""
    from pyarrow import parquet as pq

    mask = np.array([[0, 1], [1, 2]], np.uint8)
    rows = [
        {
            **dict.fromkeys(schema.IMAGES_SCHEMA.names),
            "uri": "a.png",
            "status": "ok",
            "height": 2,
            "width": 2,
            "mask": mask.tobytes(),
            "mask_encoding": "raw",
            "pixel_count": [1, 2, 1],
            "entropy": 0.5,
        },
        {**dict.fromkeys(schema.IMAGES_SCHEMA.names), "uri": "b.png", "status": "error", "error_kind": "truncated"},
    ]
    (tmp_path / "segmented/images").mkdir(parents=True)
    metadata = build_fragment_metadata(ClassMap(("road", "sky"), (0, 1)), "c" * 64, {"batch_size": 8})
    table = pa.Table.from_pylist(rows, schema.IMAGES_SCHEMA.with_metadata(metadata))
    pq.write_table(table, tmp_path / "segmented/images/part-000000.parquet")
    summary = [{"class_id": 0, "class_name": "road", "dataset_iou": 0.5, "dataset_dice": 0.6}]
    pq.write_table(pa.Table.from_pylist(summary, schema.SUMMARY_SCHEMA), tmp_path / "segmented/summary.parquet")
    return tmp_path


def test_the_sql_examples_run_in_duckdb(segmented: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import duckdb

    monkeypatch.chdir(segmented)
    num_run = 0
    for _, text in read_all():
        for block in find_code_blocks(text, "sql"):
            for statement in re.sub(r"^--.*$", "", block, flags=re.M).split(";"):
                query = re.sub(r"'(?:runs/|s3://bucket/)?segmented/", "'segmented/", statement).strip()
                if query:
                    num_run += 1
                    assert duckdb.connect().execute(query).fetchall(), query
    assert num_run >= 6


def test_the_pandas_and_polars_examples_run(segmented: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(segmented)
    blocks = find_code_blocks((DOCS / "tutorials/results.md").read_text(), "python")
    names: dict[str, Any] = {}
    for block in blocks:
        if "segray" not in block:
            exec(block, names)
    assert names["mask"].tolist() == [[0, 1], [1, 2]]
    assert names["errors"].rows() == [("truncated", 1)]
    assert list(names["uncertain"].uri) == ["a.png", "b.png"]
