"""Plan: weights and quotas (reduce), and the flat arrays that draws read (map, or regroup for ranked picks)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.artifacts import Artifact, artifact_id, read_manifest
from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.files import create_array, read_table, replacing, write_array, write_table
from tailwise.errors import UserError
from tailwise.plan.methods import PICKS, Method, find_method, method_options, weigh
from tailwise.plan.plan import CHUNK_ROWS, Plan
from tailwise.plan.quotas import MAX_BUDGET, UNIT_BITS, fill_by_scale, fill_by_shift, round_to_sum
from tailwise.plan.stream import MAX_CLUSTER
from tailwise.plan.weights import Clusters
from tailwise.progress import Track, silent
from tailwise.stages.regroup import write_value_ranks

MAX_REPEATS = 255


@dataclass(frozen=True)
class PlanRequest:
    """What a user asks of a plan; None means the method's own default.

    Attributes:
        method: a name of METHODS.
        keep: budget as a share of the samples that can be drawn; or
        budget: samples per epoch (in all, for a static plan).
        clusters: name of the clustering.
        options: of the method's weight, such as alpha and temperature.
        max_repeats: R, copies of a sample per epoch at most.
        min_per_cluster: l, the least quota of a cluster; for methods that fill by shift.
        pick: "random", "hardest" or "easiest".
        dynamic: whether each epoch is drawn anew.
        draw: "stream" (the default) or "bernoulli".
        seed: decides the draw.
    """

    method: str
    keep: float | None = None
    budget: int | None = None
    clusters: str = "main"
    options: Mapping[str, float | None] | None = None
    max_repeats: int = 1
    min_per_cluster: int | None = None
    pick: str | None = None
    dynamic: bool | None = None
    draw: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Pool:
    """What a plan is made over: groups of rows.

    Attributes:
        snapshot: whose rows.
        inputs: hashes for the manifest.
        sizes: int64 [K].
        statistics: of the non-empty groups; zero distances for the whole pool as one group.
    """

    snapshot: Snapshot
    inputs: dict[str, str]
    sizes: npt.NDArray[np.int64]
    statistics: Clusters


def make_plan(catalog: Catalog, name: str, request: PlanRequest, track: Track = silent) -> Plan:
    """Makes a plan, or opens the finished one of the same request.

    Args:
        catalog: with a clustering, unless the method needs none.
        name: of the plan.
        request: what is asked for.
        track: shows progress.

    Raises:
        UserError: the request is out of bounds or contradicts itself, or another plan has this name.
    """
    method = find_method(request.method)
    options = method_options(request.method, request.options or {})
    pool = _pool(catalog, method, request.clusters)
    pick = request.pick or method.pick
    dynamic = _dynamic(request, method, pick)
    budget = _budget(request, int(pool.sizes.sum()))
    config = {
        "method": request.method,
        "options": options,
        "clusters": request.clusters if method.grouping == "clusters" else None,
        "snapshot": pool.snapshot.number,
        "budget": budget,
        "max_repeats": request.max_repeats,
        "min_per_cluster": _min_per_cluster(request, method),
        "pick": pick,
        "dynamic": dynamic,
        "draw": _draw(request, pick),
        "seed": request.seed,
    }
    quotas = _quotas(pool, method, options, config)
    with Artifact(catalog.plan_folder(name), "plan", config, pool.inputs) as artifact:
        if not artifact.done:
            _write_groups(artifact, pool.sizes, quotas)
            _write_rows(catalog, artifact, pool, method, request.clusters, pick, track)
            write_shard_offsets(catalog, artifact, pool.snapshot)
            artifact.finish({"eligible": int(pool.sizes.sum()), "clusters": int((pool.sizes > 0).sum())})
    return Plan(catalog, name)


def write_shard_offsets(catalog: Catalog, artifact: Artifact, snapshot: Snapshot) -> None:
    """Writes the first row of each shard."""
    rows = catalog.shards(snapshot).column("rows").to_numpy()
    write_array(artifact.path("shard_offsets.npy"), np.concatenate([[0], np.cumsum(rows)]).astype(np.int64))


def _pool(catalog: Catalog, method: Method, clusters: str) -> _Pool:
    if method.grouping == "pool":
        snapshot = catalog.snapshot()
        if snapshot.rows > MAX_CLUSTER:
            raise UserError(
                f"{snapshot.rows:,} samples are more than one group can hold ({MAX_CLUSTER:,}): cluster them, and use "
                "--method proportional"
            )
        one = np.array([snapshot.rows], np.int64)
        nothing = np.zeros(1)
        return _Pool(snapshot, {"snapshot": snapshot.id}, one, Clusters(one, nothing, nothing))
    folder = catalog.clusters_folder(clusters)
    manifest = read_manifest(
        folder, "clustering", f"make it with `tailwise cluster {catalog.folder} --name {clusters}`"
    )
    snapshot = catalog.snapshot(manifest["identity"]["config"]["snapshot"])
    table = read_table(folder / "clusters.parquet")
    sizes: npt.NDArray[np.int64] = table.column("size").to_numpy()
    full = sizes > 0
    d_intra, d_inter = (table.column(name).to_numpy()[full] for name in ("d_intra", "d_inter"))
    inputs = {"snapshot": snapshot.id, "clusters": artifact_id(manifest)}
    return _Pool(snapshot, inputs, sizes, Clusters(sizes[full], d_intra, d_inter))


def _dynamic(request: PlanRequest, method: Method, pick: str) -> bool:
    if pick not in PICKS:
        raise UserError(f"unknown pick {pick!r}: use {', '.join(PICKS)}")
    if method.grouping == "pool" and pick != "random":
        raise UserError(f"--pick {pick} needs clusters, and method {request.method!r} has none")
    if request.dynamic is None:
        return method.dynamic and pick == "random"
    if request.dynamic and pick != "random":
        raise UserError(
            f"--dynamic with --pick {pick}: a ranked pick is the same every epoch; use --static or --pick random"
        )
    return request.dynamic


def _draw(request: PlanRequest, pick: str) -> str:
    if request.draw not in {None, "stream", "bernoulli"}:
        raise UserError(f"unknown draw {request.draw!r}: use stream or bernoulli")
    if pick == "random":
        return request.draw or "stream"
    if request.draw is not None:
        raise UserError(f"--draw {request.draw} with --pick {pick}: a ranked pick isn't random; use --pick random")
    if request.max_repeats != 1:
        raise UserError(f"--max-repeats {request.max_repeats} with --pick {pick}: a ranked pick takes each sample once")
    return "ranked"


def _budget(request: PlanRequest, eligible: int) -> int:
    if (request.keep is None) == (request.budget is None):
        raise UserError("give either --keep SHARE (0.277, say) or --budget SAMPLES")
    if not 1 <= request.max_repeats <= MAX_REPEATS:
        raise UserError(f"--max-repeats {request.max_repeats}: must lie between 1 and {MAX_REPEATS}")
    if request.keep is not None and not 0 < request.keep <= request.max_repeats:
        raise UserError(f"--keep {request.keep}: must be above 0 and at most {request.max_repeats} (--max-repeats)")
    budget = request.budget if request.budget is not None else round((request.keep or 0) * eligible)
    most = min(request.max_repeats * eligible, MAX_BUDGET - 1)
    if not 1 <= budget <= most:
        raise UserError(
            f"a budget of {budget:,} samples: must lie between 1 and {most:,} "
            f"({eligible:,} samples can be drawn, up to {request.max_repeats} times an epoch): see --keep, --budget, --max-repeats"
        )
    return budget


def _min_per_cluster(request: PlanRequest, method: Method) -> int:
    if method.fill == "shift":
        least = 1 if request.min_per_cluster is None else request.min_per_cluster
        if not 0 <= least < MAX_BUDGET:
            raise UserError(f"--min-per-cluster {least}: must lie between 0 and {MAX_BUDGET - 1:,}")
        return least
    if request.min_per_cluster is not None:
        raise UserError(f"--min-per-cluster does nothing with method {request.method!r}: it scales its quotas")
    return 0


def _quotas(
    pool: _Pool, method: Method, options: Mapping[str, float], config: Mapping[str, Any]
) -> npt.NDArray[np.int64]:
    """Quotas of all clusters in units of 2⁻³⁰ samples; whole samples where each is picked once and for all."""
    full = pool.sizes > 0
    sizes, budget = pool.sizes[full], int(config["budget"])
    upper = np.minimum(
        sizes * int(config["max_repeats"]), budget
    )  # no quota is above the budget; keeps units within int64
    lower = np.minimum(int(config["min_per_cluster"]), upper)
    weights = weigh(method, pool.statistics, options)
    if method.fill == "shift":
        filled = fill_by_shift(weights / weights.sum() * budget, lower.astype(float), upper.astype(float), budget)
    else:
        filled = fill_by_scale(weights, upper.astype(float), budget)
    whole = not config["dynamic"] and config["draw"] != "bernoulli"
    bits = 0 if whole else UNIT_BITS
    rounded = round_to_sum(filled * (1 << bits), budget << bits, lower << bits, upper << bits, sizes)
    quotas = np.zeros(len(pool.sizes), np.int64)
    quotas[full] = rounded << (UNIT_BITS - bits)
    return quotas


def _write_groups(artifact: Artifact, sizes: npt.NDArray[np.int64], quotas: npt.NDArray[np.int64]) -> None:
    table = pa.table(
        {
            "cluster": pa.array(np.arange(len(sizes)), pa.int32()),
            "size": pa.array(sizes, pa.int64()),
            "quota": pa.array(quotas / (1 << UNIT_BITS), pa.float64()),
            "quota_units": pa.array(quotas, pa.int64()),  # exact: quota · 2³⁰
        }
    )
    write_table(artifact.path("groups.parquet"), table)


def _write_rows(
    catalog: Catalog, artifact: Artifact, pool: _Pool, method: Method, clusters: str, pick: str, track: Track
) -> None:
    """Writes group.npy and rank.npy, flat over the snapshot."""
    rows = pool.snapshot.rows
    if method.grouping == "pool":
        spans = [(start, min(start + CHUNK_ROWS, rows)) for start in range(0, rows, CHUNK_ROWS)]
        _write_flat(artifact, "group", np.int32, rows, (np.zeros(stop - start, np.int32) for start, stop in spans))
        _write_flat(artifact, "rank", np.uint32, rows, (np.arange(*span, dtype=np.uint32) for span in spans))
        return
    parts = catalog.parts(pool.snapshot)
    labels = catalog.label_parts(clusters, pool.snapshot, "label")
    _write_flat(artifact, "group", np.int32, rows, track(labels, "clusters of rows", len(parts)))
    if pick == "random":
        ranks = catalog.label_parts(clusters, pool.snapshot, "rank")
        _write_flat(artifact, "rank", np.uint32, rows, track(ranks, "ranks of rows", len(parts)))
        return
    sign = np.float32(1 if pick == "hardest" else -1)
    values = (sign * part for part in catalog.label_parts(clusters, pool.snapshot, "similarity"))
    columns = zip(catalog.label_parts(clusters, pool.snapshot, "label"), values, strict=True)
    with replacing(artifact.path("rank.npy")) as path:
        write_value_ranks(path, pool.sizes, track(columns, "ranking samples", len(parts)))


def _write_flat(
    artifact: Artifact, name: str, dtype: npt.DTypeLike, rows: int, pieces: Iterable[npt.NDArray[Any]]
) -> None:
    with replacing(artifact.path(f"{name}.npy")) as path:
        target = create_array(path, (rows,), dtype)
        first = 0
        for piece in pieces:
            target[first : first + len(piece)] = piece
            first += len(piece)
        del target
