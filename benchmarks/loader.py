"""The loader against webdataset's filter-after-read: trained samples/s and bytes read for each, by share kept, image size and workers.

The peer is what one writes without tailwise: tarfile_to_samples, a filter by a set of keys, shuffle, decode, transform, batch, behind the
same torch DataLoader workers. Both decode and transform in the same way: `bytes` not at all; `decoded` to RGB pixels by torchvision.io;
`pil` by PIL; `augmented` as open_clip trains (PIL, RandomResizedCrop, normalised). Files are in the page cache, turns alternate, medians of
the rounds; without workers also the ratio of CPU times, which noise touches less. Bytes: of one epoch, without workers; `disk` is what the
kernel fetched with the tars dropped from the page cache before.
usage: loader.py [--quick] [--side 64 …] [--keep 0.277 …]
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pools
import torch
import webdataset as wds
from common import print_header
from open_clip.transform import image_transform
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import pil_to_tensor

import tailwise
from tailwise.loader.loader import Loader
from tailwise.shards.decode import decode_rgb
from tailwise.shards.locations import Locations
from tailwise.shards.ranges import sample_ranges

COPIES = 4  # of each image, under other keys: an epoch of a tiny pool would be over at once
SHUFFLE = 1000
SETTLE_SECONDS = 0.4


class Size(NamedTuple):
    """Images as they lie in the tars, and as they are trained on."""

    side_px: int
    crop_px: int
    images: int
    batch: int


SIZES = (Size(64, 64, 1 << 30, 256), Size(256, 224, 6000, 64), Size(512, 224, 4000, 64))
KEEPS = (1.0, 0.5, 0.277, 0.1)


def decode_pixels(encoded: bytes) -> torch.Tensor:
    return decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)


def as_it_is(pixels: torch.Tensor) -> torch.Tensor:
    return pixels


MODES: dict[str, Callable[[int], tuple[Callable, Callable | None]]] = {
    "bytes": lambda _: (decode_rgb, None),
    "decoded": lambda _: (decode_pixels, as_it_is),
    "pil": lambda _: (decode_rgb, pil_to_tensor),
    "augmented": lambda crop_px: (decode_rgb, image_transform(crop_px, is_train=True)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 px, two shares, one round")
    parser.add_argument("--side", type=int, nargs="+", help="of the images, in pixels; all by default")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEPS, help="shares; all by default")
    options = parser.parse_args()
    quick = options.quick
    torch.set_num_threads(1)  # as in workers
    print_header(
        f"loader: {pools.pool_name()}, enlarged; trained samples/s, webdataset : tailwise",
        "torch",
        "webdataset",
        "open_clip_torch",
        "pillow",
    )
    wanted = options.side or [size.side_px for size in (SIZES[:1] if quick else SIZES)]
    for size in (size for size in SIZES if size.side_px in wanted):
        with tempfile.TemporaryDirectory() as folder:
            measure(size, Path(folder), options.keep, quick)


def measure(size: Size, folder: Path, keeps: list[float], quick: bool) -> None:
    samples = list(pools.read_samples(pools.source(folder)))[: size.images]
    big = [(key, pools.enlarged(image, size.side_px), caption) for key, image, caption in samples]
    copies = ((f"{copy}{key}", image, caption) for copy in range(COPIES) for key, image, caption in big)
    per_tar = -(-len(big) * COPIES // 20)
    tars = sorted(pools.write_tars(copies, folder / "tars", per_tar).glob("*.tar"))
    catalog = tailwise.import_pool(folder / "tars", folder / "catalog").catalog
    total = sum(path.stat().st_size for path in tars)
    print(
        f"\n{size.side_px} px, crop {size.crop_px}, batches of {size.batch}: {len(big) * COPIES:,} samples of "
        f"{total / len(big) / COPIES / 1000:.1f} KB in {len(tars)} tars"
    )
    for keep in (1.0, 0.277) if quick else keeps:
        plan = tailwise.make_plan(catalog, f"keep-{keep}", tailwise.PlanRequest("random", keep=keep))
        print_bytes(plan, tars, keep, size.batch)
        for mode, functions in MODES.items():
            for workers in (0, 2):
                print_rates(plan, tars, mode, *functions(size.crop_px), workers, size.batch, rounds=1 if quick else 3)


def print_rates(
    plan: tailwise.Plan,
    tars: list[Path],
    mode: str,
    decode: Callable,
    transform: Callable | None,
    workers: int,
    batch_size: int,
    rounds: int,
) -> None:
    loader = Loader(plan, batch_size=batch_size, decode=decode, transform=transform, workers=workers)
    ours = (len(batch.rows) for batch in loader)
    theirs = (len(batch[1]) for batch in peer(plan, tars, decode, transform, workers, batch_size))
    next(ours), next(theirs)  # starts workers, compiles
    rates: dict[str, list[tuple[float, float]]] = {"webdataset": [], "tailwise": []}
    for _ in range(rounds):
        for name, batches in zip(rates, (theirs, ours), strict=True):
            rates[name].append(rate(batches, workers, seconds=1.0))
    loader.close()
    (theirs_rate, theirs_cpu), (ours_rate, ours_cpu) = (
        map(statistics.median, zip(*values, strict=True)) for values in rates.values()
    )
    spread = ", ".join(f"{min(values)[0]:,.0f}…{max(values)[0]:,.0f}" for values in rates.values())
    cpu = f"; by CPU time {theirs_cpu / ours_cpu:.2f} ({theirs_cpu:,.1f} : {ours_cpu:,.1f} us)" * (not workers)
    print(
        f"    {mode:9s} {workers} workers: {theirs_rate:9,.0f} : {ours_rate:9,.0f}   "
        f"ratio {ours_rate / theirs_rate:5.2f}   ({spread}{cpu})",
        flush=True,
    )


def rate(batches: Iterator[int], workers: int, seconds: float) -> tuple[float, float]:
    """Samples a second, and microseconds of CPU time that this process takes for each.

    Batches that were prefetched while the other had its turn are let go first.
    """
    start = time.perf_counter()
    taken = 0
    while taken <= 2 * workers + 1 or time.perf_counter() - start < SETTLE_SECONDS:
        next(batches)
        taken += 1
    start, cpu = time.perf_counter(), time.process_time()
    samples = 0
    while (now := time.perf_counter()) - start < seconds:
        samples += next(batches)
    return samples / (now - start), (time.process_time() - cpu) / samples * 1e6


def drawn_keys(plan: tailwise.Plan) -> set[str]:
    keys = chain.from_iterable(
        plan.catalog.samples(part, ["key"]).column(0).to_pylist() for part in plan.catalog.parts()
    )
    return {key for key, copies in zip(keys, plan.draw(0).tolist(), strict=True) if copies}


def peer(
    plan: tailwise.Plan,
    tars: list[Path],
    decode: Callable,
    transform: Callable | None,
    workers: int,
    batch_size: int,
    endless: bool = True,
) -> wds.WebLoader:
    """Epoch 0 again and again: its keys must be known beforehand."""
    keys = drawn_keys(plan)
    stages = [
        partial(shard_list, tars, endless),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.select(lambda sample: sample["__key__"] in keys),
        wds.shuffle(SHUFFLE, initial=SHUFFLE),
    ]
    if transform is not None:
        stages.append(wds.map_dict(jpg=lambda encoded: transform(decode(encoded))))
    pipeline = wds.DataPipeline(*stages, wds.to_tuple("jpg", "txt"), wds.batched(batch_size))
    return wds.WebLoader(pipeline, batch_size=None, num_workers=workers)


def shard_list(tars: list[Path], endless: bool) -> Iterator[dict[str, str]]:
    """Endless as one pipeline: a repeated one would fill and drain its shuffle buffer in each pass, and no moment be like another."""
    for path in cycle(tars) if endless else tars:
        yield {"url": str(path)}


def print_bytes(plan: tailwise.Plan, tars: list[Path], keep: float, batch_size: int) -> None:
    loader = Loader(plan, batch_size=batch_size)
    rows = np.concatenate([batch.rows.numpy() for batch in loader.epoch(0)])  # and warms all up
    loader.seek(0)
    shards = (np.searchsorted(plan.shard_offsets, rows, side="right") - 1).astype(np.int32)
    ranges = sample_ranges(shards, Locations(plan.catalog, plan.snapshot).of(rows))[0]
    ours = np.diff(ranges[:, 1:]).sum() / len(rows)
    theirs = sum(path.stat().st_size for path in tars) / len(rows)
    read_ours, disk_ours, samples_ours = io_of(tars, lambda: sum(len(batch.rows) for batch in loader.epoch(0)))
    read_peer, disk_peer, samples_peer = io_of(
        tars, lambda: sum(len(batch[1]) for batch in peer(plan, tars, decode_rgb, None, 0, batch_size, endless=False))
    )
    print(
        f"  keep {keep}: bytes a trained sample, webdataset : tailwise {theirs:,.0f} : {ours:,.0f} (ratio {theirs / ours:.2f}); "
        f"read() {read_peer / samples_peer:,.0f} : {read_ours / samples_ours:,.0f}; "
        f"disk {disk_peer / samples_peer:,.0f} : {disk_ours / samples_ours:,.0f}"
    )


def io_of(tars: list[Path], task: Callable[[], int]) -> tuple[int, int, int]:
    """Bytes that this process read by system calls, and those the kernel fetched from the disk for it; and what the task gives."""
    for path in tars:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    before = io_counters()
    result = task()
    after = io_counters()
    return after["rchar"] - before["rchar"], after["read_bytes"] - before["read_bytes"], result


def io_counters() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


if __name__ == "__main__":
    main()
