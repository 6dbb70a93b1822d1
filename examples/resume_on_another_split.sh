#!/usr/bin/env bash
# Train ten steps on four stages, then go on from the checkpoint with two: the losses are the same bits as if
# nothing had happened. Any argument is handed to both runs, for example: --set runs_dir=/tmp/runs
set -euo pipefail
job="$(dirname "$0")/tiny.yaml"
hybrid=${HYBRID:-hybrid}
run_of() { python3 -c 'import json, sys; print(json.loads(sys.stdin.read())["run"])'; }

first=$($hybrid train "$job" --set num_stages=4 --set checkpoint.every_steps=10 --json "$@" | run_of)
echo "four stages: $first"
rm -rf "$first/checkpoints/step-000020"   # as if the job had ended after step 10
second=$($hybrid train "$job" --set num_stages=2 --resume "$first" --json "$@" | run_of)
echo "two stages:  $second"

python3 - "$first/metrics.jsonl" "$second/metrics.jsonl" <<'PYTHON'
import json, sys
first, second = ({e["step"]: e["loss"] for e in map(json.loads, open(p)) if e["event"] == "step"} for p in sys.argv[1:])
assert second and all(first[step] == loss for step, loss in second.items()), (first, second)
print(f"steps {min(second) + 1} to {max(second) + 1}: {len(second)} losses, the same bits on both splits")
PYTHON
