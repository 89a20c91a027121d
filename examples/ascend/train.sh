#!/bin/bash
# One process on each NPU of this machine:  bash train.sh train.yaml [more options of student-train run]
# Run it again to go on.  DEVICES names NPUs, by default 0 to 7.  NODES, NODE and MASTER (the first one's address) for
# several machines that see the same output and have as many NPUs each: NODES=4 NODE=0 MASTER=box-0 bash train.sh …
set -u
config="${1:?the config of the run}"
shift
devices="${DEVICES:-0 1 2 3 4 5 6 7}"
nodes="${NODES:-1}" node="${NODE:-0}"
meet=(--standalone)
if [ "$nodes" -gt 1 ]; then
    meet=(--nnodes "$nodes" --node-rank "$node" --master-addr "${MASTER:?}" --master-port "${PORT:-29500}")
fi
export ASCEND_RT_VISIBLE_DEVICES="${devices// /,}"
# Ranks load the student and open the data at unlike speeds.
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1200}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
RANKS=$(mktemp -d)
export RANKS
trap 'rm -rf "$RANKS"' EXIT

# torchrun says 1 whatever the exit codes of its processes are, and kills them 30 s after a signal, which a checkpoint
# may take longer than.  So each rank leaves its number and its code, and gets signals from here.
rank='student-train run "$@" & rank=$!
echo "$rank" > "$RANKS/$RANK.pid"
trap "kill -TERM $rank 2>/dev/null" TERM INT
wait "$rank"; code=$?
while kill -0 "$rank" 2>/dev/null; do wait "$rank"; code=$?; done   # a signal ends `wait` early
echo "$code" > "$RANKS/$RANK.code"
exit "$code"'
stop() {
    kill -TERM $(cat "$RANKS"/*.pid 2>/dev/null) 2>/dev/null || kill -TERM "$runner" 2>/dev/null
}
# In a session of its own, so that Ctrl-C comes here and nowhere else.
setsid torchrun "${meet[@]}" --nproc-per-node "$(wc -w <<< "$devices")" --no-python \
    bash -c "$rank" rank "$config" "$@" & runner=$!
trap stop TERM INT
wait "$runner"; code=$?
while kill -0 "$runner" 2>/dev/null; do wait "$runner"; code=$?; done

# What went wrong with a rank, before that others were interrupted because of it; 143 is one that had hardly begun.
codes=$(cat "$RANKS"/*.code 2>/dev/null)
worst=$(sort -n <<< "$codes" | grep -x -v -E '0|75|143|' | tail -n 1)
[ -z "$worst" ] && grep -q -x -E '75|143' <<< "$codes" && worst=75
exit "${worst:-$code}"
