#!/bin/bash
# On the head node of a Ray cluster, or on a single machine:  bash run.sh dump.yaml [more options of teacher-dump run]
# Joins the cluster that RAY_ADDRESS names (`auto`: the one this node belongs to), else starts one on this machine.
# Runs again by itself after an interruption of Ray's head process, up to RESTARTS times; not after Ctrl-C or SIGTERM.
set -u
config="${1:?the config of the dump}"
shift
stopped='' child=''
trap 'stopped=1; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null' TERM INT

pause() {
    sleep "${PAUSE_S:-30}" &
    wait "$!"
}

for (( attempt = 0; attempt <= ${RESTARTS:-3}; attempt++ )); do
    teacher-dump run "$config" --launcher ray "$@" &
    child=$!
    wait "$child"
    code=$?
    [ -n "$stopped" ] && { wait "$child"; exit $?; }
    # 2, 3 and 4 are errors of config, data and things that do not belong together: no other attempt mends them.
    case "$code" in 0 | 2 | 3 | 4 | 75) exit "$code" ;; esac
    echo "ended with $code; attempt $((attempt + 1)) failed" >&2
    pause
    [ -n "$stopped" ] && exit 75
done
exit "$code"
