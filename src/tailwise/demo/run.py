"""The demo: a long-tailed pool of drawings, from nothing to three drawn epochs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tailwise.catalog import Catalog
from tailwise.catalog.files import read_json, write_json
from tailwise.demo.pool import make_pool
from tailwise.errors import UserError
from tailwise.plan import Plan
from tailwise.plan.explain import BIN_NAMES
from tailwise.progress import Track
from tailwise.stages.cluster import cluster
from tailwise.stages.embed import embed
from tailwise.stages.import_pool import import_pool
from tailwise.stages.plan import PlanRequest, make_plan

CLUSTERS = 192
MERGE = 0.7
EPOCHS = 3


@dataclass(frozen=True)
class DemoRow:
    """A fifth of the clusters, by size.

    Attributes:
        name: from "head" to "tail".
        clusters: how many.
        samples: members of all.
        example: a caption of the largest cluster.
        subset: samples in the DBP subset.
        epochs: samples in each drawn epoch of the DynamiCS plan.
    """

    name: str
    clusters: int
    samples: int
    example: str
    subset: int
    epochs: list[int]


@dataclass(frozen=True)
class DemoResult:
    """What the demo shows.

    Attributes:
        catalog: its folder.
        rows: by cluster size.
        subset: DBP's budget.
        unique: different samples in epoch 0, in epochs 0 and 1, …
    """

    catalog: Path
    rows: list[DemoRow]
    subset: int
    unique: list[int]


def run(folder: Path, images: int, track: Track) -> DemoResult:
    """Makes the pool in `folder`, imports, embeds, clusters, plans with both methods, and draws three epochs.

    Raises:
        UserError: `folder` holds something else, or a demo of another size.
    """
    _make_pool(folder, images)
    catalog = import_pool([str(folder / "pool")], folder / "catalog", track=track).catalog
    embed(catalog, "pixels", track=track)
    cluster(catalog, clusters=min(CLUSTERS, images), merge=MERGE, track=track)
    subset = make_plan(catalog, "subset", PlanRequest("dbp", keep=0.277), track)
    epochs = make_plan(catalog, "epochs", PlanRequest("dynamics", keep=0.5), track)
    drawn = [epochs.draw(epoch) for epoch in range(EPOCHS)]
    seen = [int((np.sum(drawn[: epoch + 1], axis=0) > 0).sum()) for epoch in range(EPOCHS)]
    picked = subset.draw(0)
    return DemoResult(catalog.folder, _rows(catalog, epochs, picked, drawn), int(picked.sum()), seen)


def _make_pool(folder: Path, images: int) -> None:
    done = folder / "pool.json"
    if done.exists():
        if (made := read_json(done)["images"]) != images:
            raise UserError(
                f"{folder} holds a demo of {made:,} images, not {images:,}: name another folder, or delete it"
            )
        return
    if folder.exists() and any(path.name != "pool" for path in folder.iterdir()):
        raise UserError(f"{folder} exists and is no demo: name a new folder")
    make_pool(folder / "pool", images=images)
    write_json(done, {"images": images})


def _rows(
    catalog: Catalog, plan: Plan, picked: npt.NDArray[np.uint8], drawn: list[npt.NDArray[np.uint8]]
) -> list[DemoRow]:
    order = np.argsort(-plan.sizes, kind="stable")
    order = order[plan.sizes[order] > 0]
    captions = [caption for part in catalog.parts() for caption in catalog.samples(part, ["caption"])[0].to_pylist()]
    rows = []
    for name, members in zip(BIN_NAMES, np.array_split(order, len(BIN_NAMES)), strict=True):
        inside = np.isin(plan.groups, members)
        example = captions[int(np.argmax(plan.groups == members[0]))]
        epochs = [int(copies[inside].sum()) for copies in drawn]
        rows.append(DemoRow(name, len(members), int(inside.sum()), example, int(picked[inside].sum()), epochs))
    return rows
