"""The job file: YAML on disk to a JobConfig, with the line of whatever is wrong.

May import only `config`, `errors` and the YAML reader.
"""

from __future__ import annotations

from pathlib import Path

from hybrid.complaints import Key
from hybrid.config import FleetConfig, JobConfig, dotted, parse_job
from hybrid.errors import ConfigError
from hybrid.marked_yaml import read_yaml


def load_job(path: Path) -> JobConfig:
    """Return the job in a YAML file; its relative paths are taken from the file's folder.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, a wrong value; names file, line, key, value and valid ones.
    """
    fix = "give the path of a job.yaml; see examples/"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("no such job file", value=str(path), fix=fix) from None
    except UnicodeDecodeError as error:
        fact = f"job file is not UTF-8 text at byte {error.start}"
        raise ConfigError(fact, where=str(path), fix="give a YAML file; see examples/") from None
    except OSError as error:
        raise ConfigError(f"job file cannot be read: {error.strerror}", value=str(path), fix=fix) from None
    document = read_yaml(text, what="job file", where=str(path))
    if not isinstance(document.value, dict):
        raise ConfigError(
            f"job file holds {'nothing' if document.value is None else 'no mapping'}",
            where=str(path),
            valid=f"a mapping of {', '.join(JobConfig.model_fields)}",
            fix="see examples/",
        )

    def place(key: Key) -> str:
        return f"{path}, line {document.line_of(key)}: {dotted(key)}"

    return _anchored(parse_job(document.value, where=place), path.parent)


def _anchored(job: JobConfig, base: Path) -> JobConfig:
    """Anchor the job's input paths to the folder of its file (a run folder stays relative to where one stands)."""
    if job.data.path is not None and not job.data.path.is_absolute():
        job = job.model_copy(update={"data": job.data.model_copy(update={"path": base / job.data.path})})
    if isinstance(job.fleet, FleetConfig) and job.fleet.catalog is not None and not job.fleet.catalog.is_absolute():
        fleet = job.fleet.model_copy(update={"catalog": base / job.fleet.catalog})
        job = job.model_copy(update={"fleet": fleet})
    if job.planner is not None:
        named = {"profile": job.planner.profile, "links": job.planner.links}
        moved = {key: base / path for key, path in named.items() if path is not None and not path.is_absolute()}
        job = job.model_copy(update={"planner": job.planner.model_copy(update=moved)}) if moved else job
    return job
