"""`hybrid validate --nki-examples FOLDER`: published NKI kernels, unmodified, on our interpreter of an NKI subset."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from hybrid.errors import MachineError


def run_nki_examples(folder: Path, *, as_json: bool) -> int:
    """Run every published kernel that we know from the folder; return 0 where each did what it must.

    Args:
        folder: the `nki` folder of a checkout of aws-neuron/aws-neuron-sdk.

    Raises:
        UserError: the folder holds no examples.
        MachineError: `ml_dtypes`, which the interpreter needs, is not installed.
    """
    if importlib.util.find_spec("ml_dtypes") is None:
        raise MachineError("the NKI interpreter needs ml_dtypes", fix="pip install 'hybrid-runtime[nki]'")
    from hybrid.testing.nki.examples import format_results, run_examples

    results = run_examples(folder)
    if as_json:
        rows = [
            {
                "file": result.file,
                "kernel": result.kernel,
                "generation": result.generation,
                "outcome": result.outcome,
                "error": result.error,
                "tolerance": result.tolerance,
            }
            for result in results
        ]
        print(json.dumps({"executed_on": "interpreter of a documented NKI subset", "results": rows}))
    else:
        print(format_results(results))
        print("Executed on our interpreter of a documented NKI subset; nothing here ran on a Trainium.")
    return 0 if all(result.ok for result in results) else 1
