#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.24.0, torch 2.13.0, Python 3.11; no vLLM is installed. Seen 2026-11-30.
#
# A folder named "vllm" in the working directory (the clone of vLLM, say, or a folder of tests) is enough for TRL to
# believe that vLLM is installed, as Python finds a namespace package of that name. Its version is then "N/A", and
# `from trl import GRPOTrainer` ends in "RuntimeError: Failed to import trl.trainer.grpo_trainer … Invalid version:
# 'N/A'", which names neither vLLM nor the folder. In any other directory the same import works.
#
# Output seen:
#   without the folder: imported GRPOTrainer
#   beside the folder: RuntimeError, the last line of it: Invalid version: 'N/A'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 trl==1.16.0 2>/dev/null
cat >"$folder/try.py" <<'PY'
import sys
sys.path.insert(0, "")  # as `python -c`, a notebook and `python -m` do
try:
    from trl import GRPOTrainer
    print("imported", GRPOTrainer.__name__)
except RuntimeError as error:
    print(f"RuntimeError, the last line of it: {str(error).splitlines()[-1]}")
PY
mkdir -p "$folder/plain" "$folder/beside/vllm"
plain=$(cd "$folder/plain" && "$folder/venv/bin/python" "$folder/try.py" 2>/dev/null)
beside=$(cd "$folder/beside" && "$folder/venv/bin/python" "$folder/try.py" 2>/dev/null)
echo "without the folder: $plain"
echo "beside the folder: $beside"
[[ $plain == "imported GRPOTrainer" && $beside == "RuntimeError, the last line of it: Invalid version: 'N/A'" ]]
