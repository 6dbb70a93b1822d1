"""Write docs/job.md, every key of the job file, from the config classes; `--check` only compares."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hybrid import config

PAGE = Path(__file__).parents[1] / "docs" / "job.md"
HEAD = """# The job file

One YAML file; unknown keys are refused with the valid ones. Only `fleet` must be given. `hybrid train JOB --set
KEY=VALUE` overrides a key for one run. This page is made from the code by `scripts/job_docs.py`.

Relative paths in the file (`data.path`, `fleet.catalog`, `planner.profile`, `planner.links`) are taken from the file's
folder; `runs_dir` from where you stand.
"""


def main() -> int:
    """Write or compare the page."""
    text = HEAD + "".join(_section(name, cls) for name, cls in _classes())
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") != text:
            print("docs/job.md is not what scripts/job_docs.py writes; run it", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


def _classes() -> list[tuple[str, type[BaseModel]]]:
    out: list[tuple[str, type[BaseModel]]] = [("", config.JobConfig)]
    for prefix, cls in out:
        for name, field in cls.model_fields.items():
            inner = _model_in(field.annotation)
            if inner is not None:
                many = "[]" if get_origin(field.annotation) is tuple else ""
                out.append((f"{prefix}.{name}{many}".lstrip("."), inner))
    return out


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _model_in(inner)
        if found is not None:
            return found
    return None


def _section(name: str, cls: type[BaseModel]) -> str:
    title = f"## `{name}`" if name else "## The job"
    doc = inspect.cleandoc(cls.__doc__ or "")
    rows = "".join(
        f"| `{key}` | {_type(field.annotation, field.metadata)} | {_default(field)} | {_cell(field.description)} |\n"
        for key, field in cls.model_fields.items()
    )
    return f"\n{title}\n\n{doc}\n\n| key | value | default | |\n|---|---|---|---|\n{rows}"


def _type(annotation: Any, metadata: list[Any]) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *more = get_args(annotation)
        return _type(base, [*more, *metadata])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join(_type(part, []) for part in get_args(annotation)) + _bounds(metadata)
    if origin is tuple:
        args = [arg for arg in get_args(annotation) if arg is not Ellipsis]
        return ("list of " if Ellipsis in get_args(annotation) else "pair of ") + _type(args[0], [])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    if origin is dict:
        return f"{_type(get_args(annotation)[1], [])} by name"
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "`true` or `false`",
        type(None): "`null`",
        Path: "path",
    }
    return names.get(annotation, str(annotation)) + _bounds(metadata)


def _bounds(metadata: list[Any]) -> str:
    out = []
    for item in metadata:
        for bound in getattr(item, "metadata", [item]):
            match bound:
                case Gt(gt=value):
                    out.append(f"> {value}")
                case Ge(ge=value):
                    out.append(f"≥ {value}")
                case Lt(lt=value):
                    out.append(f"< {value}")
                case Le(le=value):
                    out.append(f"≤ {value}")
                case MinLen():
                    pass
    return " " + ", ".join(out) if out else ""


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "**needed**"
    if isinstance(field.default, BaseModel):
        return "see below"
    value = list(field.default) if isinstance(field.default, tuple) and field.default else field.default
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    raise SystemExit(main())
