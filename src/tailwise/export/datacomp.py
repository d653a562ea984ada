"""DataComp's subset file: the uids of an epoch's samples, for its resharder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tailwise.catalog.files import replacing
from tailwise.export.drawn import drawn_parts
from tailwise.plan.plan import Plan
from tailwise.progress import Track

UID = np.dtype("u8,u8")


def write_datacomp(plan: Plan, epoch: int, path: Path, track: Track) -> int:
    """Writes a sorted 1-D array of dtype "u8,u8", a uid of several copies that often; returns the number of copies.

    The file's format wants all uids sorted, so memory is about 60 bytes per drawn sample.
    """
    pieces = []
    for part in drawn_parts(plan, epoch, ["uid"], track):
        halves = np.frombuffer(b"".join(part.samples.column("uid").to_pylist()), ">u8").reshape(-1, 2)
        pieces.append(np.repeat(halves, part.copies, axis=0).astype(np.uint64))
    halves = np.concatenate([np.empty((0, 2), np.uint64), *pieces])
    halves = halves[np.lexsort((halves[:, 1], halves[:, 0]))]
    uids = np.ascontiguousarray(halves).view(UID).reshape(-1)
    with replacing(path, unique=True) as temporary, temporary.open("wb") as stream:
        np.save(stream, uids, allow_pickle=False)
    return len(uids)
