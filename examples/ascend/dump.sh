#!/bin/bash
# One worker on each NPU of this machine:  bash dump.sh dump.yaml [more options of teacher-dump run]
# NODES and NODE share the units out over several machines that see the same output and have as many NPUs each:
# NODES=4 NODE=0 bash dump.sh …
set -u
config="${1:?the config of the dump}"
shift
devices="${DEVICES:-0 1 2 3 4 5 6 7}"
nodes="${NODES:-1}" node="${NODE:-0}"
here=$(wc -w <<< "$devices")
workers=()
trap 'kill -TERM "${workers[@]}" 2>/dev/null' TERM INT

local=0
for device in $devices; do
    # Each sees its own NPU alone, so that `device: auto` takes it.
    ASCEND_RT_VISIBLE_DEVICES="$device" teacher-dump run "$config" \
        --worker "$(( node * here + local ))/$(( nodes * here ))" "$@" >> "dump-$node-$local.log" 2>&1 &
    workers+=("$!")
    local=$(( local + 1 ))
done

# The highest exit code of all: 75 (interrupted, run again) before any error, an error before 0.
worst=0
for worker in "${workers[@]}"; do
    wait "$worker"
    code=$?
    while kill -0 "$worker" 2>/dev/null; do wait "$worker"; code=$?; done   # a signal ends `wait` early
    [ "$code" -gt "$worst" ] && worst=$code
done
tail -n 3 dump-"$node"-*.log
exit "$worst"
