"""MkDocs hooks: reference tables generated from the code, and pages made of files outside ``docs/``.

A page asks for generated text with a line ``<!-- generate: NAME -->``, where NAME is a key of ``GENERATORS``.
"""

import base64
import json
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa
import typer
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from segray import errors, schema
from segray.cli import app
from segray.config import AugmentationSettings, TrainConfig

ROOT = Path(__file__).parent.parent
SCHEMAS = {"plan": schema.PLAN_SCHEMA, "images": schema.IMAGES_SCHEMA, "summary": schema.SUMMARY_SCHEMA}
PRESETS = ("none", "light", "strong")
# Files outside docs/ that become pages of the site: path in the repository -> path of the page.
INCLUDED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks/README.md",
    "benchmarks/RESULTS.md": "benchmarks/RESULTS.md",
}
_PLACEHOLDER = re.compile(r"^<!-- generate: (\w+) -->$", re.MULTILINE)
_KEEP = "\0"  # a space at which a line must not break
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_NAMES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "`true` or `false`",
    type(None): "`null`",
    Any: "any value",
}


@dataclass(frozen=True)
class Setting:
    """One row of the settings reference."""

    name: str
    type: str
    default: str
    description: str


def list_settings(model: type[BaseModel] = TrainConfig, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting of a configuration file, sections included in their order, by dotted name."""
    for name, field in model.model_fields.items():
        path = prefix + name
        described = describe_type(field.annotation, field.metadata)
        if described:
            yield Setting(path, described, _describe_default(path, field), (field.description or "").strip())
        for inner_path, inner in _find_sections(path, field.annotation):
            yield from list_settings(inner, f"{inner_path}.")


def describe_type(annotation: Any, metadata: Any = ()) -> str:
    """Return a setting's type in words, with its bounds; empty for a section, whose settings have rows of their own."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe_type(arguments[0], [*metadata, *annotation.__metadata__])
    if origin is Literal:
        return _join_or([f"`{_to_yaml(value)}`" for value in arguments])
    if origin in (Union, types.UnionType):
        parts = [part for part in (describe_type(argument, metadata) for argument in arguments) if part]
        if set(parts) <= {"`null`"}:
            return ""
        return _join_or([*parts, "a section"] if any(map(_is_section, arguments)) else parts)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {describe_type(arguments[0])}"
        return f"[{', '.join(describe_type(argument) for argument in arguments)}]"
    if origin is dict:
        return "" if _is_section(arguments[1]) else f"map of {describe_type(arguments[1])}"
    if _is_section(annotation):
        return ""
    bounds = [
        f"{sign} {bound:g}"
        for item in metadata
        for name, sign in _BOUNDS.items()
        if _has(item, name)
        for bound in [getattr(item, name)]
    ]
    name = _NAMES.get(annotation) or str(getattr(annotation, "__name__", annotation))
    return f"{name} {' and '.join(bounds)}" if bounds and annotation in (int, float) else name


def _has(item: Any, name: str) -> bool:
    return isinstance(getattr(item, name, None), int | float)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _find_sections(path: str, annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    if _is_section(annotation):
        yield path, annotation
    elif get_origin(annotation) is dict:
        yield from _find_sections(f"{path}.<setting>", get_args(annotation)[1])
    else:
        for argument in get_args(annotation):
            if argument is not annotation:
                yield from _find_sections(path, argument)


def _describe_default(path: str, field: Any) -> str:
    section, _, name = path.partition(".")
    if section == "augmentation" and name not in ("preset", "crop_size"):
        return "by preset"
    value = field.get_default(call_default_factory=True)
    return "required" if value is PydanticUndefined else f"`{_to_yaml(value)}`"


def _to_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def _join_or(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def build_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; line breaks and pipes in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |" for line in lines
    )


def render_settings() -> str:
    """Return one table for each section of a configuration file, and one for the settings outside of sections."""
    sections: dict[str, list[Setting]] = {}
    for setting in list_settings():
        section = setting.name.partition(".")[0] if "." in setting.name else ""
        sections.setdefault(section, []).append(setting)
    parts = []
    for section in sorted(sections, key=lambda name: name != ""):
        field = TrainConfig.model_fields.get(section)
        parts.append(
            f"## {f'Section `{section}`' if field else 'Top level'}" + (f" {{: #{section} }}" if field else "")
        )
        about = next((inner.__doc__ for _, inner in _find_sections(section, field.annotation)), None) if field else None
        if about:
            parts.append(_to_markdown(about))
        rows = [[f"`{each.name}`", each.type, each.default, _sentence(each.description)] for each in sections[section]]
        parts.append(build_table(["setting", "type", "default", "description"], rows))
        if section == "augmentation":
            parts.append("### Augmentation presets\n\n" + render_presets())
    return "\n\n".join(parts)


def render_presets() -> str:
    """Return the values that each augmentation preset stands for."""
    presets = [AugmentationSettings.model_validate(preset).model_dump() for preset in PRESETS]
    names = [name for name in presets[0] if name not in ("preset", "crop_size")]
    rows = [[f"`{name}`", *(f"`{_to_yaml(preset[name])}`" for preset in presets)] for name in names]
    return build_table(["setting", *PRESETS], rows)


def render_commands() -> str:
    """Return each command of ``segray`` with its usage, arguments and options."""
    group: Any = typer.main.get_command(app)
    parts = []
    for name, command in group.commands.items():
        words = " ".join(_describe_usage(parameter).replace(" ", _KEEP) for parameter in command.params)
        usage = textwrap.fill(f"segray {name} {words}", 84, subsequent_indent="    ", break_on_hyphens=False)
        parts.append(f"## `segray {name}` {{: #{name} }}\n\n{_to_markdown(command.help or '')}")
        parts.append(f"```text\n{usage.replace(_KEEP, ' ')}\n```")
        rows = [_describe_parameter(parameter) for parameter in command.params]
        parts.append(build_table(["argument or option", "", "description"], rows))
    return "\n\n".join(parts)


def _spell(parameter: Any) -> str:
    """Return an argument or option as it is typed, such as ``--images URI``."""
    annotation = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    metavar = (parameter.metavar or "").strip("[]")
    if not metavar and isinstance(annotation, type) and issubclass(annotation, Enum):
        metavar = "|".join(str(choice.value) for choice in annotation)
    if parameter.param_type_name == "argument":
        return metavar or str(parameter.name).upper()
    is_flag = getattr(parameter, "is_flag", False)
    return (
        parameter.opts[0]
        if is_flag
        else f"{parameter.opts[0]} {metavar or getattr(annotation, '__name__', 'TEXT').upper()}"
    )


def _describe_usage(parameter: Any) -> str:
    text = _spell(parameter)
    return f"{text if parameter.required else f'[{text}]'}{'…' if parameter.multiple else ''}"


def _describe_parameter(parameter: Any) -> list[str]:
    default = parameter.default
    shown = "" if parameter.required or default in (None, False, ()) else f" Default: `{default}`."
    about = (
        _sentence(parameter.help or "")
        + (" May be repeated." if parameter.multiple and "repeated" not in (parameter.help or "") else "")
        + shown
    )
    return [f"`{_spell(parameter)}`", "required" if parameter.required else "optional", about]


def render_encoders() -> str:
    """Return which image sizes U-Net and DPT accept on the smallest member of each of timm's families."""
    table = yaml.safe_load((ROOT / "docs/reference/encoders.yaml").read_text())
    rows = [[f"`{family}`", f"`{row['encoder']}`", row["unet"], row["dpt"]] for family, row in table.items()]
    return build_table(["family", "smallest member", "`unet`", "`dpt`"], rows)


def load_column_descriptions() -> dict[str, dict[str, str]]:
    """Return the descriptions of all columns by schema and name."""
    described: dict[str, dict[str, str]] = yaml.safe_load((ROOT / "docs/reference/columns.yaml").read_text())
    return described


def render_columns(table: str) -> str:
    """Return the columns of one schema with their types and descriptions."""
    described = load_column_descriptions()[table]
    rows = [[f"`{field.name}`", _describe_arrow(field.type), described[field.name]] for field in SCHEMAS[table]]
    return build_table(["column", "type", "description"], rows)


def _describe_arrow(kind: pa.DataType) -> str:
    return f"list of {_describe_arrow(kind.value_type)}" if pa.types.is_list(kind) else str(kind).replace("large_", "")


def list_errors() -> list[type[errors.SegrayError]]:
    """Return every exception that segray raises, a base class before the classes derived from it."""
    found = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.SegrayError)
    ]
    return sorted(found, key=lambda kind: [base.__name__ for base in reversed(kind.__mro__)])


def render_exceptions() -> str:
    """Return every exception with its base class, its exit code and what it means."""
    rows = [
        [f"`{kind.__name__}`", f"`{kind.__base__.__name__}`", str(kind.exit_code), _to_markdown(kind.__doc__ or "")]
        for kind in list_errors()
        if kind.__base__
    ]
    return build_table(["exception", "derived from", "exit code", "meaning"], rows)


def render_error_kinds() -> str:
    """Return every value of the column ``error_kind`` with its meaning and remedy."""
    rows = [
        [f"`{kind.value}`", _mark_settings(kind.description), _mark_settings(kind.remedy)] for kind in errors.FaultKind
    ]
    return build_table(["error kind", "cause", "fix"], rows)


def render_notebook() -> str:
    """Return the cells of the example notebook as Markdown, with the outputs that are stored in it."""
    parts = []
    for cell in json.loads((ROOT / "docs/tutorials/notebook.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                image = base64.b64encode(base64.b64decode(data["image/png"])).decode()
                parts.append(f'<img alt="Output of the cell above" src="data:image/png;base64,{image}">')
            elif text := "".join(data.get("text/plain", "")).rstrip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts)


def _mark_settings(text: str) -> str:
    return re.sub(r"\b(?:segment|data|train)\.[a-z_]+(?:: true)?", r"`\g<0>`", text)


def _sentence(text: str) -> str:
    text = _to_markdown(text)
    return text if not text or text.endswith((".", "…")) else f"{text}."


def _to_markdown(text: str) -> str:
    """Return the description part of a docstring or help text in Markdown: reST literals become code."""
    description = re.split(r"\n\s*(?:Args|Attributes|Raises|Returns):", text)[0]
    return "\n\n".join(" ".join(part.split()) for part in description.replace("``", "`").split("\n\n")).strip()


GENERATORS: dict[str, Callable[[], str]] = {
    "settings": render_settings,
    "presets": render_presets,
    "commands": render_commands,
    "plan_columns": lambda: render_columns("plan"),
    "images_columns": lambda: render_columns("images"),
    "summary_columns": lambda: render_columns("summary"),
    "exceptions": render_exceptions,
    "error_kinds": render_error_kinds,
    "encoders": render_encoders,
    "notebook": render_notebook,
}


def include_file(path: str) -> str:
    """Return a Markdown file of the repository with its links as they are on its page of the site."""
    text = (ROOT / path).read_text()
    return text.replace("](docs/", "](").replace("](../docs/", "](../")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages made of files outside ``docs/``."""
    for source, target in INCLUDED.items():
        files.append(File.generated(config, target, content=include_file(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the placeholders of a page with generated text."""
    return _PLACEHOLDER.sub(lambda match: GENERATORS[match[1]](), markdown)
