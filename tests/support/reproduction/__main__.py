"""Run a script of tests/faults or tests/bugs: `python tests/support/reproduction tests/faults/hangs/NAME.py`.

The status is 2, not 1, if the script ends in an exception, also while it imports what it needs.
"""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # tests/support, in place of this folder

import reproduction  # noqa: E402, F401  sets sys.excepthook

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
