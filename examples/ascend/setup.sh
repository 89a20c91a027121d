#!/bin/bash
# The Python environment of an Ascend box, in the folder VENV (by default ~/logitferry):
#   bash setup.sh WHEELHOUSE     # which wheelhouse.sh has filled; nothing is fetched
#   bash setup.sh                # in a checkout, from PyPI
# TORCH_NPU=2.9.0.post2 for another CANN, see README.md; PYTHON names the interpreter.
set -euo pipefail
venv="${VENV:-$HOME/logitferry}" torch_npu="${TORCH_NPU:-2.10.0.post4}"
"${PYTHON:-python3.11}" -m venv "$venv"
if [ $# -gt 0 ]; then
    "$venv/bin/pip" install --no-index --find-links "$1" -r "$1/requirements.txt" logitferry
else
    here="$(cd "$(dirname "$0")" && pwd)"
    grep -v -E '^(torch|protobuf)==' "$here/../../constraints.txt" > "$venv/constraints.txt"
    [[ "$torch_npu" =~ ^[0-9]+\.[0-9]+\.[0-9]+ ]]
    "$venv/bin/pip" install -c "$venv/constraints.txt" "torch==${BASH_REMATCH[0]}" "torch-npu==$torch_npu" \
        -r "$here/cann-requirements.txt" "$here/../..[torch]"
fi

# From 8.5 on CANN lies in `cann`, before that in `ascend-toolkit`.
cann=
for folder in {/usr/local,"$HOME"}/Ascend/{cann,ascend-toolkit}; do
    [ -z "$cann" ] && [ -e "$folder/set_env.sh" ] && cann="$folder/set_env.sh"
done
if [ -n "$cann" ]; then
    set +u   # it looks at variables that need not be there
    source "$cann"
fi
echo "  next, in every shell: source ${cann:-the set_env.sh of CANN}; source $venv/bin/activate"
exec "$venv/bin/student-train" doctor
