#!/usr/bin/env bash
# The first minutes on a machine with a GPU, as two commands. Nothing is downloaded: what is not installed is left out by
# name. Logs and JSON, which is written after every case, go to $OUT (default: bench/results). A part that fails or runs
# out of time is reported at the end and in the exit status; later parts still run.
#
#   bench/gpu.sh check [--rehearse]   240 s: each path of a GPU once against its reference, the rates of the head's
#                                     matmuls, the loss with smaller and larger buffers, with a profile
#   bench/gpu.sh bench [--rehearse]   420 s: a 0.6B model's forward and backward, the GPU tests, peers, a whole step
#
#   --rehearse  the same on a CPU, to its end, on small shapes: it shows that the script runs, its figures say nothing
#   WHEELS      a folder of wheels to install first
#   COMMIT      the commit to write into the results outside a git checkout
#   PYTHON      the interpreter (default: python3)
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
command=${1:-}
rehearse=("${@:2}")
case $command in
  check) limit=240 ;;
  bench) limit=420 ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "bench/${0##*/}" >&2; exit 2 ;;
esac
OUT=$(realpath -m "${OUT:-bench/results}")
PYTHON=${PYTHON:-python3}
((${#rehearse[@]})) && limit=3000 # a CPU has time
DEADLINE=$((SECONDS + limit - 5))
mkdir -p "$OUT"
failed=()

export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # candidates of very different sizes share the memory in turns

# part NAME SECONDS COMMAND…: run the command with a time limit, its output to the screen and to $OUT/gpu-NAME.log
part() {
  local name=$1 limit=$2 left=$((DEADLINE - SECONDS)) status
  shift 2
  ((${#rehearse[@]})) && limit=$left
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
  "$PYTHON" -c 'import mgrpo._packing' 2>/dev/null ||
    "$PYTHON" -m pip install --no-index --no-deps --no-build-isolation --editable . || layout
}

export -f wheels layout build
export PYTHON root
[[ -z ${WHEELS:-} ]] || part wheels 60 bash -c wheels
part build 60 bash -c build
installed='import importlib.util, sys; sys.exit(importlib.util.find_spec("mgrpo.kernels") is None)'
"$PYTHON" -c "$installed" 2>/dev/null || export PYTHONPATH="$root/build/ns${PYTHONPATH:+:$PYTHONPATH}"
part versions 30 "$PYTHON" -c '
import torch, triton
print(torch.__version__, triton.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'

if [[ $command == check ]]; then
  part check 220 "$PYTHON" -m mgrpo.bench.gpu check "$OUT/gpu-check.json" "${rehearse[@]}"
else
  part model 90 "$PYTHON" -m mgrpo.bench.gpu bench "$OUT/gpu-model.json" "${rehearse[@]}"
  # A file whose imports are missing here stops no other.
  mapfile -t compiled < <(grep -rl 'mark\.gpu' tests --include='test_*.py')
  part tests 110 "$PYTHON" -m pytest -q -m gpu --continue-on-collection-errors --durations=5 "${compiled[@]}"
  part kernels 110 "$PYTHON" -m mgrpo.bench.kernels --quick "$OUT/gpu-kernels.json"
  part step 110 "$PYTHON" -m mgrpo.bench.step --quick "$OUT/gpu-step.json"
fi

echo "== $SECONDS s; results in $OUT"
((${#failed[@]} == 0)) || printf 'failed: %s\n' "${failed[@]}"
((${#failed[@]} == 0))
