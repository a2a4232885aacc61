"""What a node counts, by name: unit last, counters end in `_total` (docs/operations lists them)."""

from __future__ import annotations

from interlock.store.blocks import BlockStore
from interlock.store.slots import SlotState

COUNTERS = {
    "hits": "interlock_store_hit_blocks_total",
    "misses": "interlock_store_miss_blocks_total",
    "promoted": "interlock_store_promoted_blocks_total",
    "published": "interlock_store_published_blocks_total",
    "granted": "interlock_store_granted_blocks_total",
    "evictions": "interlock_store_evicted_blocks_total",
    "evictions_over_quota": "interlock_store_evicted_over_quota_blocks_total",
    "swept": "interlock_store_swept_blocks_total",
    "verified": "interlock_store_verified_blocks_total",
    "verified_bad": "interlock_store_verified_bad_blocks_total",
    "writers_ended": "interlock_store_frozen_writers_ended_total",
    "withdrawn": "interlock_store_withdrawn_blocks_total",
    "joins_completed": "interlock_store_joins_completed_total",
    "joins_failed": "interlock_store_joins_failed_total",
    "joins_timed_out": "interlock_store_joins_timed_out_total",
    "joins_late_reports": "interlock_store_reports_late_total",
    "joins_duplicate_reports": "interlock_store_reports_duplicate_total",
    "refused_reports": "interlock_store_reports_refused_total",
    "refused_stale_slab": "interlock_store_reports_stale_slab_total",
    "integrity_failures": "interlock_store_integrity_failures_total",
    "internal_errors": "interlock_store_internal_errors_total",
}
REFUSED = "interlock_store_refused_total"
"""Every `Fault` the node answered, whatever its code."""


def store_stats(store: BlockStore) -> dict[str, float]:
    """All counters and gauges. Costs the same however many blocks there are."""
    values = {name: float(store.counters[key]) for key, name in COUNTERS.items()}
    values[REFUSED] = float(store.counters["refused"])
    values["interlock_store_blocks"] = float(len(store))
    values["interlock_store_slab_bytes"] = float(store.slab_bytes)
    values["interlock_store_joins_pending"] = float(store.writes.joins_open)
    values["interlock_store_sessions_live"] = float(store.writes.sessions_live)
    values["interlock_store_frozen_writers"] = float(store.counters["writers_frozen"])
    values["interlock_store_pinned_bytes"] = float(store.shelf.pins.bytes)
    values["interlock_store_changes_total"] = float(store.shelf.changes.last)
    for state in SlotState:
        values[f"interlock_store_slots_{state.value}"] = float(store.slots.count[state])
        values[f"interlock_store_slots_{state.value}_bytes"] = float(store.slots.bytes[state])
    return values
