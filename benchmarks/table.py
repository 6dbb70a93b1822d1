"""Print results of `hybrid bench … --json` as Markdown: python benchmarks/table.py FILE …"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(paths: list[str]) -> None:
    for path in paths:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
        machine = told["machine"]
        print(f"\n### {Path(path).name}\n")
        memory_gib = machine["memory_bytes"] / 2**30
        print(f"{told['date']}; {machine['cpu']}, {machine['num_cores']} cores, {memory_gib:.0f} GiB;")
        print(
            f"{machine['os']}, torch {machine['packages']['torch']}; load {machine['load_average_1_min']} at the start"
        )
        print()
        print("| figure | |\n|---|---|")
        for name, value in told["summary"].items():
            print(f"| `{name}` | {value:.3f} |")
        medians = [row for row in told["rows"] if row.get("round") == "median"]
        if medians:
            print("\n| part | arm | median step | ÷ torch | ÷ ideal | rounds |\n|---|---|---|---|---|---|")
        for row in medians:
            ratios = " | ".join(f"{row[key]:.3f}" if key in row else "" for key in ("vs_torch", "vs_ideal"))
            rounds = row["num_rounds"] or ""
            print(f"| {row['part']} | {row['arm']} | {row['step_s'] * 1e3:.1f} ms | {ratios} | {rounds} |")


if __name__ == "__main__":
    main(sys.argv[1:])
