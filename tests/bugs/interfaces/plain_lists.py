"""Plain Python values are refused where the documentation takes "lists".

pack's `sampled` and log-probs cannot be lists of lists in any way (bool: "must be an int, got bool"; int: "must be bool
or uint8, got int64"; float: "must be an int, got float"); `recorded` refuses a reward that is a bool or NumPy's.
"""

import numpy as np

from mgrpo.engine import pack
from mgrpo.engine.integrations.recorded import recorded
from reproduction import fault, held

ROW = {"tokens": [1, 2], "response_length": 1, "reward": 1.0}
TOKENS, ONES = [[5, 6], [7, 8]], [1.0, 1.0]
CALLS = {
    "sampled of bools": lambda: pack(TOKENS, [[False, True], [False, True]], ONES, ONES, cap=8),
    "sampled of 0 and 1": lambda: pack(TOKENS, [[0, 1], [0, 1]], ONES, ONES, cap=8),
    "log-probs of floats": lambda: pack(
        [[5, 6]], [np.array([False, True])], [1.0], [1.0], old_logprobs=[[0.0, -1.0]], cap=8
    ),
    "a NumPy reward": lambda: recorded([ROW | {"reward": np.float32(1)}]),
    "a bool reward": lambda: recorded([ROW | {"reward": True}]),
}
pack(TOKENS, [np.array([False, True])] * 2, ONES, ONES, cap=8)  # raises nothing, nor does the next
recorded([ROW])
bad = []
for name, call in CALLS.items():
    try:
        call()
        print(name, "taken")
    except ValueError as error:
        bad.append(f"{name}: {error}")
if bad:
    fault("\n  ".join(["", *bad]))
held("all taken")
