"""Test a head split by vocabulary, with the row kernel; on a GPU all ranks share it."""

import pytest
from triton_cases import DEVICE, INTERPRETED, skip_unless_kernels_run

from cases.vocab_parallel import everything, run_ranks

skip_unless_kernels_run()
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ranks", [2] if INTERPRETED else [2, 3])
def test_shards_give_what_the_whole_head_gives(ranks, tmp_path):
    run_ranks(everything, ranks, tmp_path, where=DEVICE)
