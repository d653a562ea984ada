"""Facts about a demo, counted from the outputs of its commands and from the known truth of a drawn pool."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tailwise.catalog import Catalog
from tailwise.catalog.drops import DropList
from tailwise.evaluate.metrics import thirds
from tailwise.plan.plan import Plan
from tailwise.shards.locations import Locations
from tailwise.shards.ranges import sample_ranges


@dataclass(frozen=True)
class Duplicates:
    """How well a drop list matches the planted near-duplicates."""

    dropped: int  # number of samples in the drop list
    recall: float  # share of the planted near-duplicates that the list drops
    # share of the list that are planted near-duplicates. Any member of a family (an original and its copies) counts as a copy, as long as
    # one member stays
    precision: float


def read_table(path: Path) -> dict[str, list[str]]:
    """Return the lines of a tab-separated file without its header: the first value, and the others."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return {first: others for first, *others in lines}


def keys_of(catalog: Catalog) -> list[str]:
    """Return the key of every sample, in the order of the rows."""
    return [key for part in catalog.parts() for key in catalog.samples(part, ["key"]).column(0).to_pylist()]


def count_duplicates(catalog: Catalog, name: str, truth: Path) -> Duplicates:
    """Compare a drop list with the planted near-duplicates; `truth` is the pool's `duplicates.tsv`."""
    source = {key: original for key, (original,) in read_table(truth).items()}
    mask = DropList(catalog, name).mask[:]
    families = [source.get(key, key) for key in keys_of(catalog)]
    kept = {family for family, gone in zip(families, mask, strict=True) if not gone}
    dropped = int(mask.sum())
    right = dropped - (len(set(families)) - len(kept))
    return Duplicates(dropped, right / max(len(source), 1), right / max(dropped, 1))


def share_of_rare_concepts(plan: Plan, truth: Path, counts: Sequence[int], epochs: int) -> tuple[float, float]:
    """Return the share of the rarest third of the concepts in the pool, and in the plan's first epochs."""
    concepts = {key: int(values[0]) for key, values in read_table(truth).items()}
    rare = thirds(np.array(counts))["few"]
    inside = np.isin([concepts[key] for key in keys_of(plan.catalog)], rare)
    drawn = draws(plan, epochs)
    return float(inside.mean()), float(drawn[inside].sum() / drawn.sum())


def share_of_small_clusters(plan: Plan, epochs: int) -> tuple[float, float]:
    """Return the share of the smaller half of the clusters among the candidates, and in the plan's first epochs."""
    order = np.argsort(plan.sizes, kind="stable")
    order = order[plan.sizes[order] > 0]
    small = order[: len(order) // 2]
    counts = np.sum([plan.counts(epoch) for epoch in range(epochs)], axis=0)
    return float(plan.sizes[small].sum() / plan.sizes.sum()), float(counts[small].sum() / counts.sum())


def draws(plan: Plan, epochs: int) -> npt.NDArray[np.int64]:
    """Return how often each row is drawn in the first epochs in total: int64 [N]."""
    total: npt.NDArray[np.int64] = np.sum([plan.draw(epoch) for epoch in range(epochs)], axis=0, dtype=np.int64)
    return total


@dataclass(frozen=True)
class Trained:
    """The samples of a training, from the record that it wrote."""

    rows: npt.NDArray[np.int64]  # int64 [n], row of each trained sample, in order
    digest: str  # first 16 hexadecimal digits of the SHA-256 of rows, pixels and texts of all batches, in order


def read_record(path: Path) -> Trained:
    """Read the record of a training. A batch that was trained again after a kill has two lines; the later one counts."""
    batches = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            batch = json.loads(line)
        except json.JSONDecodeError:  # incomplete because of a kill
            continue
        batches[batch["batch"]] = (batch["rows"], batch["pixels"], batch["texts"])
    ordered = [batches[number] for number in sorted(batches)]
    rows = np.array([row for batch, _, _ in ordered for row in batch], np.int64)
    return Trained(rows, hashlib.sha256(json.dumps(ordered).encode()).hexdigest()[:16])


def bytes_read(plan: Plan, rows: npt.NDArray[np.int64]) -> int:
    """Return the number of bytes that the loader reads from the tars for some samples."""
    ranges = sample_ranges(plan.shards_of(rows), Locations(plan.catalog, plan.snapshot).of(rows))[0]
    return int(np.diff(ranges[:, 1:]).sum())


def pool_bytes(plan: Plan) -> int:
    """Return the number of bytes of all tars of the pool."""
    return int(plan.catalog.shards(plan.snapshot).column("size_bytes").to_numpy().sum())


def same_weights(first: Path, second: Path) -> bool:
    """Return whether the models of two checkpoints of open_clip are equal, bit for bit."""
    one, other = (torch.load(path, map_location="cpu", weights_only=True)["state_dict"] for path in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
