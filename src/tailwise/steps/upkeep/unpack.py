"""Unpack: plain tars in place of a catalog's compressed ones, so that samples can be read at random."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from tailwise.catalog.catalog import Catalog
from tailwise.catalog.schema import FINGERPRINT, SHARD_SCHEMA
from tailwise.context import Context
from tailwise.errors import DamagedError
from tailwise.execution.base import Apply, Needs
from tailwise.shards.fingerprint import compare_shard, read_fingerprint, shard_blocks
from tailwise.shards.packed import packed_shards, unpack_into
from tailwise.shards.tar import without_packing
from tailwise.shards.webdataset import checksum_shard
from tailwise.steps.importing.shards import SMALL_BYTES
from tailwise.storage.files import FREE_BYTES, open_binary
from tailwise.storage.local import replacing


def unpack(catalog: Catalog, folder: Path, context: Context | None = None) -> int:
    """Unpack the compressed tars of a catalog into a folder, and make the catalog read those; return their number.

    Samples, embeddings and plans stay as they are. A tar that is there already, from an interrupted call, is not unpacked again.

    Raises:
        DamagedError: a tar cannot be read, or is not the one that was imported; the catalog is as before.
        UserError: another process is writing the catalog.
    """
    context = context or Context()
    shards = packed_shards(catalog.shards()).to_pylist()
    folder = folder.expanduser().absolute()
    if shards:
        folder.mkdir(parents=True, exist_ok=True)
    names = [without_packing(shard["path"].rsplit("/", 1)[-1]) for shard in shards]
    counts = Counter(names)
    items = [
        (shard, folder / (name if counts[name] == 1 else f"{shard['shard']:08d}-{name}"))
        for shard, name in zip(shards, names, strict=True)
    ]
    small = sum(shard["size_bytes"] for shard in shards) <= SMALL_BYTES
    made = context.map(Apply(_unpack), items, "unpacking tars", Needs(workers=1 if small else None))
    if rows := list(made):
        catalog.replace_shards(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA))
    return len(items)


def _unpack(item: tuple[Mapping[str, Any], Path]) -> dict[str, Any]:
    """Unpack a shard (a row of SHARD_SCHEMA) to a path, unless it is there; return its new row."""
    shard, target = item
    try:
        if not (target.exists() and checksum_shard(str(target))[1] == shard["index_checksum"]):
            compare_shard(shard["path"], shard[FINGERPRINT], 1)
            with open_binary(shard["path"]) as file, replacing(target) as temporary, temporary.open("wb") as stream:
                unpack_into(file, stream, shutil.disk_usage(target.parent).free - FREE_BYTES)
        size_bytes, checksum = checksum_shard(str(target))
        with shard_blocks(str(target)) as (_, read):
            fingerprint = read_fingerprint(str(target), size_bytes, read)
    except OSError as error:
        raise DamagedError(
            f"{shard['path']} can't be unpacked ({error}): restore it, then repeat this command"
        ) from error
    if checksum != shard["index_checksum"]:
        raise DamagedError(f"{shard['path']} has other members than when it was imported: put the old file back")
    return {**shard, "path": str(target), "size_bytes": size_bytes, FINGERPRINT: fingerprint}
