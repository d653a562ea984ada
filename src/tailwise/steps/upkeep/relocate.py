"""Relocate: other paths for the shards of a catalog, checked before they are written."""

from __future__ import annotations

import pyarrow as pa

from tailwise.catalog.catalog import Catalog
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.shards.containers import with_bytes
from tailwise.shards.fingerprint import comparable_shards
from tailwise.shards.verify import Damage, damaged_shards

INDEXED = 16  # tars whose headers are walked; of the others the size is compared


def relocate(catalog: Catalog, old: str, new: str, context: Context | None = None) -> int:
    """Replace the leading folders `old` of the shards' paths by `new`; returns how many paths changed.

    The size of every moved tar must be that of the import; so must the index of INDEXED of them, at even distances. (The others are
    compared with their fingerprint when they are opened.)

    Raises:
        UserError: no path begins so, a moved tar is missing or another one, two shards would become one file, or another process is
            writing the catalog.
    """
    context = context or Context()

    def check(moved: pa.Table) -> None:
        moved = comparable_shards(catalog, table=moved)
        tars = with_bytes(moved)
        sample = (0, max(1, -(-tars.num_rows // INDEXED)))
        found = damaged_shards(moved, "size", context=context)
        if found := found or damaged_shards(tars, "index", share=sample, context=context):
            raise _refused(found, moved.num_rows)

    return catalog.relocate(old, new, check)


def _refused(found: list[Damage], moved: int) -> UserError:
    first = found[0]
    return UserError(
        f"{len(found):,} of {moved:,} shards are not where they would be: {first.path} is {first.reason}; move the shards there first, or "
        "name the folder that holds them"
    )
