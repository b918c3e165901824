"""`python -m mgrpo.bench.step [--quick] [FILE]`: as `mgrpo bench step`; FILE gets the JSON after every case."""

import sys
from pathlib import Path

from mgrpo.bench.step.run import main

files = [Path(name) for name in sys.argv[1:] if not name.startswith("-")]
main("--quick" in sys.argv, files[0] if files else None)
