"""Who leaves first among blocks of several layouts and tenants: their orders, side by side, and what each tenant uses.

A tenant with a quota has orders of its own, so that it can evict its own blocks first; all others share one order a
layout. Orders share a clock of uses, so their victims can be compared: whoever was used longest ago leaves, whoever's he
is. Bytes are those of slots: being written, published or in quarantine, each counts for the tenant that it was taken for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from interlock.core.eviction import LeafARC, UseClock
from interlock.core.limits import TENANT_CHARS_MAX, TENANTS_WITH_QUOTA_MAX
from interlock.store.refusal import Refusal

ANY_TENANT = "*"
"""The quota of every named tenant that has none of its own."""


class Victim(msgspec.Struct, frozen=True):
    """The block that leaves next in one order."""

    key: bytes
    layout: int
    age: int
    """Uses of other blocks since its own last use."""


class Orders:
    """The eviction orders of one slab."""

    def __init__(self, quotas: Mapping[str, int] | None = None) -> None:
        """`quotas`: bytes by tenant. Raises `ValueError` for a negative one or too many of them."""
        self.quotas = dict(quotas or {})
        if len(self.quotas) > TENANTS_WITH_QUOTA_MAX or any(value < 0 for value in self.quotas.values()):
            raise ValueError(f"at most {TENANTS_WITH_QUOTA_MAX} tenants have a quota, of 0 bytes or more")
        self._clock = UseClock()
        self._orders: dict[tuple[int, str], LeafARC] = {}
        self._bytes: dict[str, int] = {}
        self._tenant_of: dict[int, str] = {}
        """Of each slot that was taken for a named tenant."""

    def __iter__(self) -> Iterator[LeafARC]:
        return iter(self._orders.values())

    def of(self, layout: int, tenant: str) -> LeafARC:
        """The order in which that tenant's blocks of that layout leave; made when first needed."""
        where = (layout, tenant if self.quota(tenant) is not None else "")
        order = self._orders.get(where)
        if order is None:
            order = self._orders[where] = LeafARC(self._clock)
        return order

    def victim(
        self, *, layout: int | None = None, but: int | None = None, tenant: str = "", coming: int = 0
    ) -> Victim | None:
        """The block used longest ago that may leave: of that layout, of any but that one, of that tenant's own.

        `coming`: blocks being written.
        """
        best: Victim | None = None
        for (number, whose), order in self._orders.items():
            if number == but or (layout is not None and number != layout) or (tenant and whose != tenant):
                continue
            key = order.victim(coming)
            if key is not None and (best is None or order.age(key) > best.age):
                best = Victim(key, number, order.age(key))
        return best

    # --- what each tenant uses -----------------------------------------------------------------------------------

    def quota(self, tenant: str) -> int | None:
        """In bytes; None without one. Who has no name has none."""
        return self.quotas.get(tenant, self.quotas.get(ANY_TENANT)) if tenant else None

    def used_bytes(self, tenant: str) -> int:
        """Of all slots taken for that tenant."""
        return self._bytes.get(tenant, 0)

    def tenants(self) -> list[str]:
        """Named tenants that have a slot."""
        return sorted(self._bytes)

    def admits(self, tenant: str) -> bool:
        """Whether one more tenant with a quota can have an order of his own."""
        known = tenant in self._bytes or self.quota(tenant) is None
        return known or len(self._bytes) < TENANTS_WITH_QUOTA_MAX

    def check(self, tenant: str) -> None:
        """Raises `Refusal` for a tenant of whom nothing may be written here now."""
        if len(tenant) > TENANT_CHARS_MAX:
            raise Refusal("bad_start", f"a tenant's name has at most {TENANT_CHARS_MAX} characters")
        if self.quota(tenant) == 0:
            raise Refusal("tenant_not_stored", f"nothing of tenant {tenant!r} is stored here: its quota is 0")
        if not self.admits(tenant):
            raise Refusal(
                "too_many_tenants",
                f"{TENANTS_WITH_QUOTA_MAX} tenants with a quota have blocks here already",
                retryable=True,
            )

    def take(self, slot: int, tenant: str, slot_bytes: int) -> None:
        """That slot is taken for that tenant from now on."""
        if tenant:
            self._tenant_of[slot] = tenant
            self._bytes[tenant] = self._bytes.get(tenant, 0) + slot_bytes

    def give_back(self, slot: int, slot_bytes: int) -> None:
        """That slot is free."""
        tenant = self._tenant_of.pop(slot, "")
        if tenant:
            left = self._bytes[tenant] - slot_bytes
            if left:
                self._bytes[tenant] = left
            else:
                del self._bytes[tenant]
                self._tidy(tenant)

    def check_integrity(self, slot_bytes: Mapping[int, int]) -> None:
        """Raises `AssertionError` unless bytes by tenant are those of its slots. `slot_bytes`: of every slot that is not free."""
        for order in self._orders.values():
            order.check_integrity()
        sums: dict[str, int] = {}
        for slot, tenant in self._tenant_of.items():
            sums[tenant] = sums.get(tenant, 0) + slot_bytes[slot]
        assert sums == self._bytes, (sums, self._bytes)

    def _tidy(self, tenant: str) -> None:
        """A tenant without a slot needs no orders."""
        for where in [w for w, order in self._orders.items() if w[1] == tenant and order.idle]:
            del self._orders[where]
