#!/bin/bash
# The plan, and when it is there, the workers:  bash submit.sh dump.yaml [--set a.b=c …]
set -euo pipefail
here="$(dirname "$0")"
export CONFIG="${1:?the config of the dump}"
shift
plan=$(sbatch --parsable "$here/plan.sbatch" "$@")
sbatch --dependency="afterok:${plan%%;*}" --kill-on-invalid-dep=yes "$here/dump.sbatch" "$@"
echo "teacher-dump status $CONFIG   # from any machine that reaches the output"
