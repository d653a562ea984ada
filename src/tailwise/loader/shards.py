"""Whether the tars are still what the catalog says, before an epoch is read from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.schema import FINGERPRINT, has_bytes
from tailwise.errors import UserError
from tailwise.execution.base import Apply, Needs
from tailwise.execution.local import LocalExecutor, default_workers
from tailwise.plan.plan import Plan
from tailwise.progress import Track, silent
from tailwise.shards.fingerprint import (
    EVERY,
    FIRST,
    ChangedShardError,
    check_fingerprint,
    comparable_shards,
    shard_blocks,
)
from tailwise.shards.webdataset import checksum_shard
from tailwise.storage.errors import RemoteError, RemoteUnsupportedError
from tailwise.storage.remote import forget_failures
from tailwise.text import command_line, did_you_mean

THREADS_A_WORKER = 8  # a look at a size only waits


@dataclass(frozen=True)
class Damage:
    """A tar that can't be used.

    Attributes:
        shard: its id.
        path: local path or URL.
        reason: what is wrong.
    """

    shard: int
    path: str
    reason: str


@dataclass(frozen=True)
class _Noted:
    """What the catalog says of a tar."""

    shard: int
    path: str
    size_bytes: int
    index_checksum: str
    fingerprint: str | None


def _reason(shard: _Noted, look: Callable[[_Noted], str | None]) -> str | None:
    try:
        return look(shard)
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


def _by_size(shard: _Noted) -> str | None:
    """Compare the length and the first block."""
    return _by_content(shard, FIRST)


def _by_index(shard: _Noted) -> str | None:
    """Compare the length, the members and all blocks of the fingerprint."""
    found, checksum = checksum_shard(shard.path)
    if found == shard.size_bytes and checksum != shard.index_checksum:
        return "other members, or in other places, than when it was imported"
    return _by_content(shard, EVERY)


def _by_content(shard: _Noted, step: int) -> str | None:
    with shard_blocks(shard.path) as (found, read):
        if found not in {shard.size_bytes, None}:
            return f"{found:,} bytes; {shard.size_bytes:,} when it was imported"
        check_fingerprint(shard.path, shard.size_bytes, read, shard.fingerprint, step)
    return None


def _look_at_size(shard: _Noted) -> str | None:
    return _reason(shard, _by_size)


def _look_at_index(shard: _Noted) -> str | None:
    return _reason(shard, _by_index)


def _none(shards: list[_Noted], workers: int) -> Iterator[str | None]:  # noqa: ARG001
    return iter([None] * len(shards))


def _sizes(shards: list[_Noted], workers: int) -> Iterator[str | None]:
    with ThreadPoolExecutor(THREADS_A_WORKER * workers) as pool:
        yield from pool.map(_look_at_size, shards)


def _indices(shards: list[_Noted], workers: int) -> Iterator[str | None]:
    return LocalExecutor().map(Apply(_look_at_index), shards, Needs(workers=workers))


CHECKS: dict[str, Callable[[list[_Noted], int], Iterator[str | None]]] = {
    "none": _none,
    "size": _sizes,
    "index": _indices,
}


def require_bytes(plan: Plan) -> None:
    """Refuses a plan that draws samples whose images nobody has downloaded.

    Raises:
        UserError: it does.
    """
    offsets = plan.shard_offsets
    paths = plan.catalog.shards(plan.snapshot).column("path").to_pylist()
    tables = [shard for shard, path in enumerate(paths) if not has_bytes(path)]
    for shard in tables:
        drawn = int((plan.rate(slice(int(offsets[shard]), int(offsets[shard + 1]))) > 0).sum())
        if drawn:
            listing = command_line("export", plan.catalog.folder, plan.name, to="datacomp", output="SUBSET.npy")
            raise UserError(
                f"plan {plan.name!r} draws samples of {len(tables):,} file(s) of metadata, which hold no images ({drawn:,} of "
                f"{paths[shard]}): download them ({listing} tells "
                "DataComp's tools which), and import the tars into a new catalog"
            )


def check_shards(
    catalog: Catalog,
    snapshot: Snapshot,
    check: str = "size",
    workers: int | None = None,
    share: tuple[int, int] = (0, 1),
    track: Track = silent,
) -> list[Damage]:
    """Compares a snapshot's tars, local or remote, with what the import noted. Tables of metadata are passed over.

    Args:
        catalog: whose tars.
        snapshot: which of them.
        check: a name of CHECKS: "none"; "size" opens each tar and compares its length and first block; "index" compares all headers
            and blocks throughout the tar.
        workers: processes ("index") or eighths of threads ("size"); None for one a processor.
        share: (number, of how many): looks at every so many-th tar only.
        track: shows progress.

    Returns:
        The tars that are missing, unreadable or changed, by id.

    Raises:
        UserError: unknown check, or a file system whose package is not installed.
    """
    forget_failures()
    if check not in CHECKS:
        raise UserError(f"unknown check {check!r}: {did_you_mean(check, CHECKS)}")
    return damaged_shards(with_bytes(comparable_shards(catalog, snapshot, track)), check, workers, share, track)


def with_bytes(table: pa.Table) -> pa.Table:
    """Return the shards that are tars; the others are tables of metadata."""
    return table.filter(pa.array([has_bytes(path) for path in table.column("path").to_pylist()], pa.bool_()))


def damaged_shards(
    table: pa.Table,
    check: str,
    workers: int | None = None,
    share: tuple[int, int] = (0, 1),
    track: Track = silent,
) -> list[Damage]:
    """As `check_shards`, of the tars in a table of shards (schema.SHARD_SCHEMA)."""
    columns = ("shard", "path", "size_bytes", "index_checksum", FINGERPRINT)
    noted = (_Noted(*row) for row in zip(*(table.column(name).to_pylist() for name in columns), strict=True))
    shards = list(noted)[share[0] :: share[1]]
    reasons = CHECKS[check](shards, workers or default_workers())
    looked_at = track(zip(shards, reasons, strict=True), "checking shards", len(shards))
    return [Damage(shard.shard, shard.path, reason) for shard, reason in looked_at if reason is not None]
