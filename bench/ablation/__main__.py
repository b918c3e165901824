"""Run `python -m mgrpo.bench.ablation --out DIR`."""

import sys

from mgrpo.bench.ablation.run import main
from mgrpo.engine.system.process import Interrupted

try:
    main()
except Interrupted as stop:
    print(stop, file=sys.stderr)
    sys.exit(130)
except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
