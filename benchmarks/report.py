"""`tailwise report` of a made-up catalog: seconds, memory and bytes; then the page in a browser without a graphics card.

2,000,000 samples in tars (a few hundred drawn images, captions of made-up words), 50,000 clusters, two plans. The page is measured from
its navigation: first paint, and until charts and gallery answer. Then the map is brushed: frames are paints of all charts.
No peer makes such a page; embedding-atlas shows samples, and plans nothing.
usage: report.py FOLDER [--rows 2000000] [--clusters 50000]; the pool stays in FOLDER, so that a second run begins with the report
"""

import argparse
import io
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import print_header
from kmeans_memory import run
from PIL import Image
from playwright.sync_api import Page, sync_playwright

DIMENSION, SHARDS, IMAGES, WORDS = 16, 40, 300, 20_000
CHROMIUM = "/usr/bin/chromium"
TAILWISE = [sys.executable, "-m", "tailwise", "--quiet"]
MOVES = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--clusters", type=int, default=50_000)
    asked = parser.parse_args()
    print_header(f"report: {asked.rows:,} samples, {asked.clusters:,} clusters", "bokeh", "playwright")
    catalog = asked.folder / "catalog"
    if not (catalog / "plans" / "subset").exists():
        make_pool(asked.folder, asked.rows)
        steps = (
            ["import", asked.folder / "tars", asked.folder / "embeddings", catalog],
            ["cluster", catalog, "--k", asked.clusters, "--iterations", 2, "--points-per-centroid", 8],
            ["plan", catalog, "epochs", "--method", "dynamics", "--keep", 0.3],
            ["plan", catalog, "subset", "--method", "dbp", "--keep", 0.3],
        )
        for step in steps:
            began = time.perf_counter()
            subprocess.run([*TAILWISE, *map(str, step)], check=True)
            print(f"{step[0]}: {time.perf_counter() - began:.0f} s", flush=True)
    output = asked.folder / "report"
    made = run("--quiet", "report", catalog, "--output", output)
    files = [path.stat().st_size for path in output.rglob("*") if path.is_file()]
    print(made.said + f"report: {made.seconds:.1f} s, peak {made.peak_bytes / 1e9:.2f} GB of the main process")
    print(
        f"page: {(output / 'index.html').stat().st_size / 1e6:.1f} MB, {sum(files) / 1e6:.1f} MB in {len(files):,} files"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        measure(page, (output / "index.html").resolve().as_uri())
        browser.close()


def measure(page: Page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("html[data-ready]", state="attached", timeout=120_000)
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    ready = page.evaluate("performance.getEntriesByName('tailwise-interactive')[0].startTime")
    print(f"first paint {paint / 1000:.2f} s, interactive {ready / 1000:.2f} s")
    for name in ("map", "distances"):
        chart = page.locator(f'[data-chart="{name}"]')
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        left, top = box["x"] + 80, box["y"] + 30
        page.mouse.move(left, top)
        page.mouse.down()
        before, began = page.evaluate("window.tailwisePaints"), time.perf_counter()
        for step in range(MOVES):
            page.mouse.move(left + step * (box["width"] - 120) / MOVES, top + step * (box["height"] - 90) / MOVES)
        frames, seconds = page.evaluate("window.tailwisePaints") - before, time.perf_counter() - began
        page.mouse.up()
        print(f"brushing {name}: {frames / seconds:.1f} frames/s; {page.locator('#count').inner_text()} selected")


def make_pool(folder: Path, rows: int) -> None:
    """Write tars, and embeddings in clip-retrieval layout."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(IMAGES):
        stream = io.BytesIO()
        small = random.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(small).resize((48, 48), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=60)
        images.append(stream.getvalue())
    concepts = np.minimum(random.zipf(1.25, rows), WORDS) - 1
    centres = random.normal(size=(WORDS, DIMENSION)).astype(np.float32)
    each = -(-rows // SHARDS)
    (folder / "tars").mkdir(parents=True, exist_ok=True)
    for name in ("img_emb", "metadata"):
        (folder / "embeddings" / name).mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        mine = concepts[shard * each : (shard + 1) * each]
        x = centres[mine] + 0.7 * random.normal(size=(len(mine), DIMENSION)).astype(np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        np.save(folder / "embeddings" / "img_emb" / f"img_emb_{shard}.npy", x.astype(np.float16))
        keys = [f"{shard * each + at:09d}" for at in range(len(mine))]
        captions = [f"word{at} thing{at % 977} of kind{at % 31}" for at in mine.tolist()]
        table = pa.table({"image_path": keys, "caption": captions})
        pq.write_table(table, folder / "embeddings" / "metadata" / f"metadata_{shard}.parquet")
        with tarfile.open(folder / "tars" / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, caption, concept in zip(keys, captions, mine.tolist(), strict=True):
                for suffix, content in (("jpg", images[concept % IMAGES]), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
