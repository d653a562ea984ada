"""Verification: whether shards are still what the catalog says, before samples are read from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.schema import FINGERPRINT
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import Apply, Needs, default_workers
from tailwise.shards.containers import container_named, with_bytes
from tailwise.shards.fingerprint import (
    EVERY,
    FIRST,
    ChangedShardError,
    check_fingerprint,
    comparable_shards,
    shard_blocks,
)
from tailwise.storage.errors import RemoteError, RemoteUnsupportedError
from tailwise.storage.remote import forget_failures
from tailwise.text import did_you_mean

CHECKS = ("none", "size", "index")
THREADS_A_WORKER = 8  # a look at a size only waits


@dataclass(frozen=True)
class Damage:
    """A shard that cannot be used."""

    shard: int  # its id
    path: str  # local path or URL
    reason: str  # what is wrong


def check_shards(
    catalog: Catalog,
    snapshot: Snapshot,
    check: str = "size",
    workers: int | None = None,
    share: tuple[int, int] = (0, 1),
    context: Context | None = None,
) -> list[Damage]:
    """Return the shards of a snapshot, local or remote, that are missing, unreadable or changed since the import, by id.

    Shards whose files an import replaced are among them, shards without
    bytes are not. A file system whose package is not installed is a UserError.

    `check` is one of CHECKS: "none"; "size" opens each shard and compares its length and first block; "index" compares the index and
    blocks throughout the shard. `workers` are processes ("index") or eighths of threads ("size"); None for one a processor. `share` is
    (first, step): shards first, first + step, … are checked.
    """
    context = context or Context()
    forget_failures()
    if check not in CHECKS:
        raise UserError(f"unknown check {check!r}: {did_you_mean(check, CHECKS)}")
    shards, replaced = with_bytes(comparable_shards(catalog, snapshot, context)), catalog.replaced()
    gone = pa.array([shard in replaced for shard in shards["shard"].to_pylist()], pa.bool_())
    found = damaged_shards(shards.filter(pc.invert(gone)), check, workers, share, context)
    if check != "none":
        rows = shards.filter(gone).select(["shard", "path"]).to_pylist()
        found += [Damage(row["shard"], row["path"], "its samples are gone: make a new plan") for row in rows]
    return sorted(found, key=attrgetter("shard"))


def damaged_shards(
    table: pa.Table,
    check: str,
    workers: int | None = None,
    share: tuple[int, int] = (0, 1),
    context: Context | None = None,
) -> list[Damage]:
    """Return the damaged ones of some shards with bytes (SHARD_SCHEMA); see `check_shards`."""
    context = context or Context()
    if check == "none":
        return []
    shards = table.select(["shard", "path", "size_bytes", "index_checksum", FINGERPRINT]).to_pylist()[
        share[0] :: share[1]
    ]
    workers = workers or default_workers()
    with ThreadPoolExecutor(THREADS_A_WORKER * workers) as threads:  # it starts none until it is used
        reasons: Iterable[str | None]
        if check == "size":
            reasons = threads.map(partial(_reason, indexed=False), shards)
        else:
            reasons = context.executor.map(Apply(partial(_reason, indexed=True)), shards, Needs(workers=workers))
        looked_at = context.progress(zip(shards, reasons, strict=True), "checking shards", len(shards))
        return [Damage(shard["shard"], shard["path"], reason) for shard, reason in looked_at if reason is not None]


def _reason(shard: Mapping[str, Any], *, indexed: bool) -> str | None:
    """Return why a shard (a row of SHARD_SCHEMA) is not the one that was imported; None if it is."""
    try:
        return _difference(shard, indexed=indexed)
    except FileNotFoundError:
        return "missing"
    except ChangedShardError:
        return "other content than when it was imported"
    except RemoteUnsupportedError:
        raise
    except RemoteError as error:
        return f"unreadable: {error.cause}"
    except OSError as error:
        return f"unreadable: {type(error).__name__}: {error}"


def _difference(shard: Mapping[str, Any], *, indexed: bool) -> str | None:
    path, size_bytes = shard["path"], shard["size_bytes"]
    if indexed:
        own_bytes, checksum = container_named(path, images=True).checksum(path)
        if own_bytes == size_bytes and checksum != shard["index_checksum"]:
            return "other members, or in other places, than when it was imported"
    with shard_blocks(path) as (found, read):
        if found not in {size_bytes, None}:
            return f"{found:,} bytes; {size_bytes:,} when it was imported"
        check_fingerprint(path, size_bytes, read, shard[FINGERPRINT], EVERY if indexed else FIRST)
    return None
