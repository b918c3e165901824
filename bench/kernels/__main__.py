"""`python -m mgrpo.bench.kernels [--quick]`: as `mgrpo bench kernels`, where only torch and triton are installed."""

import sys

from mgrpo.bench.kernels.run import main

main("--quick" in sys.argv[1:])
