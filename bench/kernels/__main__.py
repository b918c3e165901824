"""`python -m mgrpo.bench.kernels [--quick] [FILE]`: as `mgrpo bench kernels`, with torch and triton alone.

FILE: where the JSON is written after every case.
"""

import sys
from pathlib import Path

from mgrpo.bench.kernels.run import main

files = [Path(name) for name in sys.argv[1:] if not name.startswith("-")]
main("--quick" in sys.argv, files[0] if files else None)
