"""Keep the shared statistics in a database: queries, groups, leases, roles, published weights."""

from mgrpo.engine.store.roles import FencedError
from mgrpo.engine.store.store import Store
from mgrpo.engine.store.tables import (
    STATES,
    STATUSES,
    CallRecord,
    Claim,
    Group,
    Lease,
    Publication,
    RolloutRecord,
)

__all__ = [
    "STATES",
    "STATUSES",
    "CallRecord",
    "Claim",
    "FencedError",
    "Group",
    "Lease",
    "Publication",
    "RolloutRecord",
    "Store",
]
