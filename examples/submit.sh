#!/usr/bin/env bash
# Run the tiny job on a Ray cluster by Ray Jobs: ships this folder, follows the log, returns the job's exit status.
#   examples/submit.sh http://HOST:8265
# The cluster must offer the fleet's devices; an emulated chip is a custom resource of a node, for example
#   ray start --head --resources='{"emulated_trn2": 2, "emulated_h100": 2}'
# and every node must have hybrid-runtime installed.
set -euo pipefail
address=${1:?give the address of the cluster\'s dashboard: http://HOST:8265}
shift
exec "${HYBRID:-hybrid}" submit "$(dirname "$0")/tiny.yaml" --address "$address" "$@"
