"""Run the reproductions of faults: runs that hang or end, silent losses, trust in other machines, growth.

Each script is also of use alone: `python tests/support/reproduction tests/faults/hangs/user_exit0_hangs_run.py` exits
with 1 if the fault is there, 0 if it is not, 2 if it could not be tried (a healthy run must end well first).
FAULT_LIMIT: seconds after which a run that does not end counts as hung.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from reproduction.verdicts import check, parameters

LIMIT = 1500.0  # seconds for one script on a busy machine; those of hanging runs take five minutes
STANDING = (  # faults that are there; who mends one removes its line
    "crashes/all_failed_run_ends_well",
    "crashes/confusing_errors",
    "crashes/damaged_metrics_ends_run",
    "crashes/damaged_trajectory_ends_run",
    "crashes/long_trajectory_ends_run",
    "crashes/object_store_outage_ends_processes",
    "crashes/server_nonsense_ends_worker",
    "crashes/timeout_race_invalid_state",
    "crashes/user_error_kinds_end_run",
    "hangs/clock_back_hangs_metrics",
    "hangs/colocated_async_hang",
    "hangs/earlier_checkpoint_hangs",
    "hangs/same_name_after_rm_hangs",
    "hangs/user_exit0_hangs_run",
    "hangs/user_sync_hang_hangs_run",
    "scaling/judge_threads_leak",
    "scaling/launcher_watch_grows",
    "scaling/many_workers_postgres",
    "security/remote_client_trusts_server",
    "security/remote_code_prompt",
    "security/worker_name_traversal",
    "silent/checkpoint_bits_unchecked",
    "silent/gc_under_idle_worker",
    "silent/relative_store_url",
    "silent/same_name_two_runs_one_store",
    "silent/score_mutates_episode",
    "silent/stale_trainer_prunes_successors_checkpoints",
    "silent/state_without_moments",
    "silent/tasks_order_mixes_groups",
    "silent/trajectory_digest_unchecked",
)
NEEDS = {"crashes/object_store_outage_ends_processes": "moto"}  # with its server, and s3fs: 'moto[server]' s3fs


@pytest.mark.nightly
@pytest.mark.parametrize("script", parameters(Path(__file__).parent, STANDING, NEEDS))
def test_a_fault_is_gone(script: Path) -> None:
    check(script, LIMIT)
