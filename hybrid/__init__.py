"""`hybrid`: one model, one job, several vendors' chips.

The public names are listed by hand and loaded when first used, so that `import hybrid` needs neither torch nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid.config import JobConfig
    from hybrid.errors import HybridError
    from hybrid.hardware import Fleet, build_fleet, load_catalog
    from hybrid.job_file import load_job
    from hybrid.models.profile import build_profile
    from hybrid.scheduler.plan import Plan
    from hybrid.scheduler.planner import plan

__version__ = "0.1.0"

_MODULE_OF_NAME = {
    "Fleet": "hybrid.hardware",
    "HybridError": "hybrid.errors",
    "JobConfig": "hybrid.config",
    "Plan": "hybrid.scheduler.plan",
    "build_fleet": "hybrid.hardware",
    "build_profile": "hybrid.models.profile",
    "load_catalog": "hybrid.hardware",
    "load_job": "hybrid.job_file",
    "plan": "hybrid.scheduler.planner",
}

__all__ = [
    "Fleet",
    "HybridError",
    "JobConfig",
    "Plan",
    "__version__",
    "build_fleet",
    "build_profile",
    "load_catalog",
    "load_job",
    "plan",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module 'hybrid' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULE_OF_NAME[name]), name)
