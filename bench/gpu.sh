#!/usr/bin/env bash
# Builds, tests the compiled kernels and runs the benchmarks on a machine with a GPU, within ten minutes. Logs and JSON
# go to $OUT (default: bench/results). A failed part is reported at the end and in the exit status; later parts still run.
#
#   bench/gpu.sh [--quick]      --quick is passed to the benchmarks
#   WHEELS  a folder of wheels to install first, for a machine without a network
#   COMMIT  the commit to write into the results outside a git checkout
#   PYTHON  the interpreter (default: python3)
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
OUT=$(realpath -m "${OUT:-bench/results}")
PYTHON=${PYTHON:-python3}
DEADLINE=$((SECONDS + 585))
mkdir -p "$OUT"
failed=()

export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # candidates of very different sizes share the memory in turns

# part NAME SECONDS COMMAND…: run the command with a time limit, its output to the screen and to $OUT/gpu-NAME.log
part() {
  local name=$1 limit=$2 left=$((DEADLINE - SECONDS)) status
  shift 2
  ((limit < left)) || limit=$left
  echo "== $name (at most $limit s of the $left s left)"
  if ((limit <= 0)); then
    failed+=("$name: no time left")
    return 1
  fi
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$OUT/gpu-$name.log"
  status=${PIPESTATUS[0]}
  ((status == 0)) || failed+=("$name: exit status $status (124 and 137: out of time)")
  return "$status"
}

# bench NAME SECONDS: run mgrpo bench NAME, and write its last line to $OUT/gpu-NAME.json
bench() {
  part "$1" "$2" "$PYTHON" -c 'from mgrpo.engine.cli.main import main; main()' bench "$1" "${quick[@]}" &&
    tail -n 1 "$OUT/gpu-$1.log" >"$OUT/gpu-$1.json"
}

# Install one at a time: a wheel that does not fit this Python must not prevent the others.
wheels() {
  local wheel status=0
  for wheel in "$WHEELS"/*.whl; do
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$wheel" || status=1
  done
  return "$status"
}

# Without the build tools: link the packages from here, and build the C++ packer if cmake and pybind11 are installed.
layout() {
  local part pybind
  mkdir -p build/ns/mgrpo
  for part in engine kernels bench api/__init__.py; do ln -sfn "$root/$part" "build/ns/mgrpo/${part##*/}"; done
  pybind=$("$PYTHON" -m pybind11 --cmakedir) &&
    cmake -S . -B build/gpu -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
      -Dpybind11_DIR="$pybind" &&
    cmake --build build/gpu --parallel &&
    cp build/gpu/_packing*.so build/ns/mgrpo/
}

build() {
  "$PYTHON" -m pip install --no-index --no-deps --no-build-isolation --editable . || layout
}

quick=("$@")
export -f wheels layout build
export PYTHON root
[[ -z ${WHEELS:-} ]] || part wheels 90 bash -c wheels
part build 90 bash -c build
installed='import importlib.util, sys; sys.exit(importlib.util.find_spec("mgrpo.kernels") is None)'
"$PYTHON" -c "$installed" 2>/dev/null || export PYTHONPATH="$root/build/ns${PYTHONPATH:+:$PYTHONPATH}"
part versions 30 "$PYTHON" -c '
import torch, triton
print(torch.__version__, triton.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
# Name the files: one whose imports are missing here would prevent the collection of all the others.
mapfile -t compiled < <(grep -rl 'mark\.gpu' tests --include='test_*.py')
part tests 150 "$PYTHON" -m pytest -q -m gpu --durations=5 "${compiled[@]}"
bench kernels 250
[[ ! -f bench/packing/run.py ]] || bench packing 60
bench step 200
[[ $OUT -ef bench/results || ! -f bench/results/gpu-step.png ]] || cp bench/results/gpu-step.png "$OUT"
part reference 60 "$PYTHON" -m pytest -q tests/kernels/test_kernels_*.py

echo "== $SECONDS s; results in $OUT"
((${#failed[@]} == 0)) || printf 'failed: %s\n' "${failed[@]}"
((${#failed[@]} == 0))
