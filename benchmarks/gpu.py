"""The commands that use a GPU, at a realistic size: seconds, rate, share of the device's peak, peak device memory.

    benchmarks/gpu.sh [--small] [--peak-tflops 989]    # the last part of gpu.sh; the only one with --small

- embed: drawn images, 64 pixels, through open_clip's ViT-B-32 at 224 pixels (random weights; the speed does not depend on them).
- cluster, dedup: made-up embeddings in DataComp's layout. FLOP of `cluster`: 2 · K · d for each row that is
  assigned and for each training row in each iteration, also for products that bounds spare.
- train: open_clip's trainer on a plan of the drawn images. FLOP: 3 times those of a forward pass.
Peak: dense bfloat16 products, by the name of the device or --peak-tflops. The data are made before the clock starts.
Memory: highest value of `nvidia-smi`, ten times a second; all processes of the device count.
"""

import argparse
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import print_header
from torch.utils.flop_counter import FlopCounterMode

from tailwise.catalog import Catalog
from tailwise.catalog.files import read_json
from tailwise.catalog.layout import MANIFEST
from tailwise.demo.pool import make_pool
from tailwise.requests import ClusterRequest

PEAKS_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.0}
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class Size:
    """What is measured."""

    images: int
    rows: int
    dimension: int
    clusters: int
    epochs: int
    batch: int


FULL = Size(images=32_768, rows=2_000_000, dimension=512, clusters=10_000, epochs=8, batch=1024)
SMALL = Size(images=256, rows=4_000, dimension=64, clusters=20, epochs=1, batch=32)


def main():
    logging.disable(logging.WARNING)  # open_clip's, of random weights
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small size and a tiny model, on any machine")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 products of the device")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.small:
        sys.exit("gpu.py: no CUDA device; --small runs the same commands on the CPU")
    name = torch.cuda.get_device_name() if cuda else "CPU"
    peak = arguments.peak_tflops or next((value for part, value in PEAKS_TFLOPS.items() if part in name), None)
    size = SMALL if arguments.small else FULL
    print_header(f"GPU check on {name}: {size}", "torch", "open_clip_torch")
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), size, "cuda" if cuda else "cpu", peak)


def measure(place, size, device, peak):
    model = write_model(place / "model", tiny=size is SMALL)
    image_flop, sample_flop = forward_flop(model)
    draw_images(place / "images", size.images)
    make_rows(place / "rows", size)
    pictures, rows = place / "pictures.catalog", place / "rows.catalog"
    tailwise("import", place / "images", pictures)
    tailwise("import", place / "rows", rows, "--embedding", "b32")
    print(f"{'command':<10} {'seconds':>8} {'samples/s':>12} {'TFLOP/s':>8} {'of peak':>8} {'device memory':>14}")

    used = timed(
        "embed",
        pictures,
        "--encoder",
        f"checkpoint:{place / 'model' / 'weights.pt'}",
        "--model",
        model,
        "--device",
        device,
    )
    report("embed", used, size.images, size.images * image_flop, peak)
    used = timed("cluster", rows, "--k", size.clusters, "--device", device)
    iterations = read_json(rows / "clusters" / "main" / MANIFEST)["summary"]["iterations"]
    trained = min(size.rows, ClusterRequest.points_per_centroid * size.clusters)
    flop = 2.0 * size.clusters * size.dimension * (size.rows + iterations * trained)
    report("cluster", used, size.rows, flop, peak)
    used = timed("dedup", rows, "--epsilon", "0.05", "--device", device)
    sizes = cluster_sizes(Catalog.open(rows))
    report("dedup", used, size.rows, float((sizes.astype(np.float64) ** 2).sum()) * size.dimension, peak)
    tailwise("plan", pictures, "random", "--method", "random", "--keep", "0.5")
    batch = ["--batch-size", size.batch, "--precision", "amp_bf16" if device == "cuda" else "fp32", "--device", device]
    words = [
        "--model",
        model,
        *batch,
        "--warmup",
        10,
        "--workers",
        min(os.cpu_count() or 1, 12),
        "--logs",
        place / "logs",
    ]
    used = timed("train", pictures, "random", "--epochs", size.epochs, "--", *words)
    seen = size.epochs * size.images // 2 // size.batch * size.batch
    report("train", used, seen, 3.0 * seen * sample_flop, peak)


def tailwise(*words):
    line = [sys.executable, "-m", "tailwise", *map(str, words)]
    done = subprocess.run(line, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"gpu.py: {' '.join(line[3:])} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def timed(*words):
    """Seconds, and bytes of the device's memory at most (None without nvidia-smi)."""
    peak, done = [0], threading.Event()
    smi = shutil.which("nvidia-smi")

    def watch():
        while smi and not done.wait(0.1):
            query = [smi, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
            found = subprocess.run(query, check=False, capture_output=True, text=True).stdout
            peak[0] = max(peak[0], sum(int(number) for number in re.findall(r"\d+", found)))

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    try:
        tailwise(*words)
    finally:
        seconds = time.perf_counter() - began
        done.set()
        thread.join()
    return seconds, peak[0] << 20 if smi else None


def report(command, used, samples, flop, peak):
    seconds, memory = used
    speed = flop / seconds / 1e12
    share = f"{speed / peak:8.1%}" if peak else f"{'–':>8}"
    held = f"{memory / 1e9:11.1f} GB" if memory is not None else f"{'–':>14}"
    print(f"{command:<10} {seconds:8.1f} {samples / seconds:12,.0f} {speed:8.2f} {share} {held}", flush=True)


def write_model(folder, tiny):
    """A model with random weights; returns its name for open_clip."""
    folder.mkdir()
    name = "ViT-B-32"
    if tiny:
        stats = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": stats}))
        name = f"local-dir:{folder}"
    torch.manual_seed(0)
    torch.save(open_clip.create_model(name, load_weights=False).state_dict(), folder / "weights.pt")
    return name


def forward_flop(name):
    """FLOP of one image, and of one sample of a training (image and caption)."""
    model = open_clip.create_model(name, load_weights=False).eval()
    side = model.visual.image_size[0] if isinstance(model.visual.image_size, tuple) else model.visual.image_size
    text = torch.zeros((1, model.context_length), dtype=torch.long)
    flop = []
    for run in (lambda: model.encode_image(torch.zeros(1, 3, side, side)), lambda: model.encode_text(text)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        flop.append(counter.get_total_flops())
    return float(flop[0]), float(sum(flop))


def draw_images(folder, images):
    """Drawn images, as many pools as processes."""
    processes = min(os.cpu_count() or 1, 16, images // 64)
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(draw_part, [(folder / f"{part:02d}", images // processes, part) for part in range(processes)]))


def draw_part(task):
    folder, images, seed = task
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_pool(folder, images=images, concepts=64, shards=-(-images // 5000), size_px=64, seed=seed)


def make_rows(folder, size):
    """Embeddings around centres, a tenth of them near-duplicates, in DataComp's layout."""
    folder.mkdir()
    random = np.random.default_rng(0)
    centres = random.standard_normal((max(size.rows // 400, 1), size.dimension), np.float32)
    step = 100_000
    for number, first in enumerate(range(0, size.rows, step)):
        count = min(step, size.rows - first)
        rows = centres[random.integers(0, len(centres), count)]
        rows += 0.7 * random.standard_normal(rows.shape, np.float32)
        copies = random.integers(0, count, count // 10)
        rows[copies] = rows[(copies + 1) % count] + 0.05 * random.standard_normal(
            (len(copies), size.dimension), np.float32
        )
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        halves = rows.astype(np.float16)
        np.savez(folder / f"{number:04d}.npz", b32_img=halves, b32_txt=halves)
        table = {"uid": [f"{first + at:032x}" for at in range(count)], "text": ["a caption"] * count}
        pq.write_table(pa.table(table), folder / f"{number:04d}.parquet")


def cluster_sizes(catalog):
    table = pq.read_table(catalog.clusters_folder("main") / "clusters.parquet")
    return table.column("size").to_numpy()


if __name__ == "__main__":
    main()
