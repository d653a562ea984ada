"""The whole pipeline locally, and on two Ray nodes with 1, 3 and 5 workers: the hash of each artifact, and whether all are equal.

Steps: import, embeddings by `lite0` and by a tiny open_clip model with random weights, scores, clusters (merged, with density), dedup,
plans (dbp, dynamics), a draw, all exports, verify. The encoders run on CPUs, one thread for each worker. Seconds and CPU time are
those of each run, processes that read images included; the driver's share of the CPU time is the driver process alone.
usage: ray_bytes.py [--pool FOLDER] [--samples 2000] [--workers 1 3 5]
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import open_clip
import pools
import ray
import torch
from common import print_header
from ray.cluster_utils import Cluster
from ray_nodes import actor_seconds

import tailwise
from tailwise.catalog import Catalog
from tailwise.execution.ray import RayExecutor
from tailwise.export import EXPORTS, export
from tailwise.plan.plan import Plan
from tailwise.requests import ClusterRequest, DedupRequest, EmbedRequest, ExportRequest, FilterRequest, PlanRequest
from tailwise.steps.embedding.embed import embed
from tailwise.steps.upkeep.verify import verify

TARS, PART_ROWS = 12, 400
NODES = (3, 2)  # processors
OBJECT_STORE_BYTES = 300 << 20
EPOCH = 2
Steps = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, help="folder of tars with .jpg and .txt")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 3, 5])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print_header(f"same bytes on Ray: {asked.samples:,} samples", "ray", "torch", "open_clip_torch", "timm", "pyarrow")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = islice(pools.read_samples(asked.pool or pools.source(folder)), asked.samples)
        tars = pools.write_tars(samples, folder / "tars", -(-asked.samples // TARS), uids=True)
        checkpoint = make_checkpoint(folder / "model")
        made = {"local": run(folder / "local", tars, checkpoint, tailwise.Context(), None)}
        nodes = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": NODES[0],
                "object_store_memory": OBJECT_STORE_BYTES,
                "include_dashboard": False,
            },
        )
        nodes.add_node(num_cpus=NODES[1], object_store_memory=OBJECT_STORE_BYTES)
        try:
            for workers in asked.workers:
                with RayExecutor(nodes.address, cpus=1, workers=workers) as executor:
                    context = tailwise.Context(executor=executor)
                    label = f"{workers} worker{'s' if workers > 1 else ''}"
                    made[label] = run(folder / str(workers), tars, checkpoint, context, nodes)
        finally:
            ray.shutdown()
            nodes.shutdown()
    for artifact, expected in made["local"].items():
        others = [label for label, hashes in made.items() if hashes.get(artifact) != expected]
        print(f"    {artifact:34s} {expected}  {'differs: ' + ', '.join(others) if others else 'equal'}")
    equal = all(hashes == made["local"] for hashes in made.values())
    print(f"    {'all are equal' if equal else 'NOT EQUAL'}: {', '.join(made)}")
    raise SystemExit(0 if equal else 1)


def make_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of a tiny CLIP with random weights, in the layout of a run of open_clip."""
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    folder.mkdir()
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(7)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    (folder / "checkpoints").mkdir()
    (folder / "params.txt").write_text(f"model: local-dir:{folder}\n")
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "checkpoints" / "epoch_1.pt")
    return folder / "checkpoints" / "epoch_1.pt"


def run(
    folder: Path,
    tars: Path,
    checkpoint: Path,
    context: tailwise.Context,
    nodes: Cluster | None,
) -> dict[str, str]:
    """Run all steps in a new folder; return the hash of each artifact."""
    folder.mkdir()
    seconds = time.perf_counter()
    driver = os.times()
    actors = actor_seconds(nodes) if nodes else 0.0
    for step in steps(folder, tars, checkpoint, context).values():
        step()
    seconds = time.perf_counter() - seconds
    own = cpu_seconds(os.times()) - cpu_seconds(driver)
    others = actor_seconds(nodes) - actors if nodes else 0.0
    share = f", driver {own:.1f} s ({own / (own + others):.1%})" if nodes else ""
    print(f"    {folder.name:8s} {seconds:7.1f} s, CPU {own + others:7.1f} s{share}", flush=True)
    return hashes(folder)


def cpu_seconds(times: os.times_result) -> float:
    return times.user + times.system + times.children_user + times.children_system


def steps(folder: Path, tars: Path, checkpoint: Path, context: tailwise.Context) -> Steps:
    place = folder / "catalog"

    def catalog() -> Catalog:
        return Catalog.open(place)

    def made(name: str) -> Plan:
        return Plan(catalog(), name)

    def encode(encoder: str, column: str, of: str | None = None) -> None:
        embed(catalog(), EmbedRequest(encoder=encoder, column=column, of=of, device="cpu", batch_size=32), context)

    def filtered(by: str) -> None:
        tailwise.filter_samples(catalog(), FilterRequest(by, keep=0.9), context)

    def plan(name: str, request: PlanRequest) -> None:
        tailwise.make_plan(catalog(), name, request, context)

    def write(name: str, plan_name: str, path: Path) -> None:
        sharding = ExportRequest(shard_samples=400) if name == "shards" else None
        epoch = None if name in {"plan-bundle", "urls"} else EPOCH  # these are of all epochs
        export(made(plan_name), name, path, epoch=epoch, request=sharding, context=context)

    without = ["duplicates", "clip-score"]
    return {
        "import": lambda: tailwise.import_pool(tars, place, part_rows=PART_ROWS, context=context),
        "embed lite0": lambda: encode("lite0", "lite0", "image"),
        "embed open_clip": lambda: encode(f"checkpoint:{checkpoint}", "both"),
        **{f"filter {name}": lambda name=name: filtered(name) for name in ("clip-score", "caption-words", "cliploss")},
        "cluster": lambda: tailwise.cluster(
            catalog(), ClusterRequest(k=40, merge=0.9, density="auto", column="lite0"), context
        ),
        "dedup": lambda: tailwise.dedup(catalog(), DedupRequest(epsilon=0.03), context),
        "plan dbp": lambda: plan("dbp", PlanRequest("dbp", keep=0.4, without=without)),
        "plan dynamics": lambda: plan("dynamics", PlanRequest("dynamics", keep=0.5, without=without)),
        "draw dbp": lambda: write("parquet", "dbp", folder / "export dbp parquet"),
        **{f"export {name}": lambda name=name: write(name, "dynamics", folder / f"export {name}") for name in EXPORTS},
        "verify": lambda: verified(catalog(), context),
    }


def verified(catalog: Catalog, context: tailwise.Context) -> None:
    _, faults = verify(catalog, context)
    assert not faults, faults


def hashes(folder: Path) -> dict[str, str]:
    """Return a hash of paths and content for each artifact: each entry two levels down in the catalog, and each export."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"):
        names = path.relative_to(folder).parts
        artifact = "/".join(names[1:3] if names[0] == "catalog" else names[:1])
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        found.setdefault(artifact, hashlib.sha256()).update(f"{'/'.join(names)} {content}\n".encode())
    return {name: each.hexdigest()[:16] for name, each in found.items()}


if __name__ == "__main__":
    main()
