"""An interpreter of a documented subset of NKI 0.6, on NumPy and ml_dtypes.

It runs kernels that `import nki` unmodified, at the limits of a NeuronCore generation, and refuses by the name of a
rule what the vendor's documents forbid. It is a functional model: no timing, no scheduling, no allocator. What it ran
was "executed on our interpreter of a documented NKI subset", never validated on Trainium.

Needs ml_dtypes (the `dev` extra).
"""

from hybrid.testing.nki.generations import Generation, generations
from hybrid.testing.nki.lint import Finding, lint_file
from hybrid.testing.nki.machine import Machine, Usage
from hybrid.testing.nki.refusal import NkiRefused, Rule, rules
from hybrid.testing.nki.standin import KernelRun, interpreting, load_kernels, run_kernel

__all__ = [
    "Finding",
    "Generation",
    "KernelRun",
    "Machine",
    "NkiRefused",
    "Rule",
    "Usage",
    "generations",
    "interpreting",
    "lint_file",
    "load_kernels",
    "rules",
    "run_kernel",
]
