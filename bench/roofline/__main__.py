"""`python -m mgrpo.bench.roofline [--quick]`: as `mgrpo bench roofline`."""

import sys

from mgrpo.bench.roofline.run import main

main("--quick" in sys.argv)
