#!/bin/bash
# All wheels for an Ascend box without a network, from a machine that has one; needs uv (pip install uv).
#   bash wheelhouse.sh [FOLDER [REQUIREMENT ...]]
#   bash wheelhouse.sh wheelhouse torch-npu==2.9.0.post2 'numpy<2'    # for another CANN, see README.md
# ARCH=x86_64 and PYTHON=3.10 or so for a box that is not aarch64 with Python 3.11; EXTRAS for others than torch.
set -euo pipefail
folder="${1:-wheelhouse}"
shift || true
arch="${ARCH:-aarch64}" python="${PYTHON:-3.11}" extras="${EXTRAS:-torch}"
root="$(cd "$(dirname "$0")/../.." && pwd)"
command -v uv > /dev/null || { echo "error: uv is not here
  next: pip install uv" >&2; exit 2; }
mkdir -p "$folder"

# The set that is tested, but for torch, which torch-npu decides, protobuf, which CANN does, and what is asked for here.
asked=("$@")
[[ " $* " == *" torch-npu"* ]] || asked+=("torch-npu==2.10.0.post4")
named="torch protobuf"
for each in "${asked[@]}"; do
    named+=" ${each%%[<>=!~ \[]*}"
    # Older releases of torch-npu do not say themselves which torch they are built for.
    [[ "$each" =~ ^torch-npu==([0-9]+\.[0-9]+\.[0-9]+) ]] && asked+=("torch==${BASH_REMATCH[1]}")
done
grep -v -i -E "^(${named// /|})==" "$root/constraints.txt" > "$folder/constraints.txt"

# pip would take this machine for the one that installs: only uv asks what torch needs on another.
place=(--python-version "$python" --python-platform "$arch-manylinux_2_28" --only-binary :all:)
options=()
for extra in $extras; do options+=(--extra "$extra"); done
printf '%s\n' "${asked[@]}" | uv pip compile --quiet "${place[@]}" "${options[@]}" -c "$folder/constraints.txt" \
    --no-annotate --no-header "$root/pyproject.toml" "$root/examples/ascend/cann-requirements.txt" - \
    -o "$folder/requirements.txt"
if grep -q -E '^(nvidia|cuda)-' "$folder/requirements.txt"; then
    echo "warning: this torch is a build for another maker's devices, and asks for gigabytes of their packages" >&2
    echo "  next: a torch-npu up to 2.10 on aarch64, or a CPU build of torch, see README.md" >&2
fi

platforms=()
for glibc in 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_$arch"); done
python3 -m pip download --no-deps --only-binary=:all: --dest "$folder" --python-version "$python" \
    "${platforms[@]}" --platform "manylinux2014_$arch" -r "$folder/requirements.txt"
python3 -m pip wheel --no-deps --wheel-dir "$folder" "$root"

# As the box will resolve them, with nothing but the folder.
uv pip install --quiet --dry-run --no-index --find-links "$folder" "${place[@]}" --target "$folder/.none" \
    -r "$folder/requirements.txt" logitferry
wheels=("$folder"/*.whl)
echo "$folder: ${#wheels[@]} wheels, $(du -shc "${wheels[@]}" | tail -n 1 | cut -f 1), complete"
echo "  next: carry $folder and this folder to the box, and there: bash setup.sh $(basename "$folder")"
