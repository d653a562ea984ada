"""Group by source: the folders that the shards of a pool come from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.files import digest
from tailwise.context import Context
from tailwise.requests import GroupRequest
from tailwise.steps.grouping.write import NO_GROUP, Groups, Pool, config_of, make_grouping

SOURCE = "source"  # what the grouping is by, and its name


def sources_of(paths: Sequence[str]) -> list[str]:
    """Return the source of each shard: the first folder of its path below the folders that all paths share.

    A shard that lies in the shared folder itself has the name of this folder. So /data/laion/0.tar and /data/cc12m/a/0.tar have the
    sources laion and cc12m.
    """
    folders = [path.split("/")[:-1] for path in paths]
    levels = itertools.takewhile(lambda names: len({*names}) == 1, zip(*folders, strict=False))
    shared = [names[0] for names in levels]
    own = next(filter(None, reversed(shared)), "pool")
    return [folder[len(shared)] if len(folder) > len(shared) else own for folder in folders]


def sources_in_order(catalog: Catalog, snapshot: Snapshot) -> list[str]:
    """Return the sources of a snapshot, each once, in the order in which their first shards were imported."""
    return list(dict.fromkeys(sources_of(catalog.shards(snapshot).column("path").to_pylist())))


def group_by_source(catalog: Catalog, request: GroupRequest, context: Context | None = None) -> Clustering:
    """Make groups of the newest snapshot by the sources of the shards (see `sources_of`), in the order of their names."""
    snapshot = catalog.snapshot()
    shards = catalog.shards(snapshot)
    found = sources_of(shards.column("path").to_pylist())
    values = sorted(set(found))
    config = config_of(SOURCE, request, snapshot)

    def find(pool: Pool) -> Groups:
        ids = shards.column("shard").to_numpy()
        numbers: npt.NDArray[np.int32] = np.full(int(ids.max(initial=-1)) + 1, NO_GROUP, np.int32)
        numbers[ids] = [values.index(source) for source in found]
        parts = (numbers[catalog.samples(part, ["shard"]).column(0).to_numpy()] for part in pool.parts)
        return Groups(values, parts)

    name = request.name or SOURCE
    return make_grouping(catalog, name, config, {"sources": digest(found)}, find, SOURCE, context or Context())
