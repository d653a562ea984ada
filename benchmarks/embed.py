"""`tailwise embed` of images: img/s against the model's own ceiling, in bf16 and fp32, by torch, and where the time goes.

Models of real size with random weights, saved to and loaded from local folders: ViT-B/32 on a CPU; ViT-B/16 and DINOv2-base on a GPU.
*Ceiling*: the same loaded model on one preloaded batch, again and again. *Embed* and *peer*: from the end of the first batches to the end
of the last, so that neither pays for starting its workers. The peer is what one writes without tailwise, and what clip-retrieval 2.45 does
(its reader and mapper; it can't be installed beside numpy 2 and open_clip 3): webdataset, the model's transform in DataLoader workers,
fp32, float16 unit rows; and the same under autocast. Turns alternate. Shares: decoding and preprocessing by one thread, the model as at
its ceiling. On a GPU, `--workers` may be given several times: where img/s stops to grow, the model is the limit, below it decoding is.
usage: embed.py [--pool FOLDER_OF_TARS] [--images 320] [--side 64] [--batch-size 64] [--workers 2 …] [--device auto] [--rounds 1]
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import open_clip
import pools
import torch
import webdataset as wds
from common import print_header
from PIL import Image

import tailwise
from tailwise.context import Context
from tailwise.encoders import Encoder, load_encoder
from tailwise.encoders.backends import has_native_bf16
from tailwise.execution.base import default_workers
from tailwise.requests import EmbedRequest, EncoderRequest
from tailwise.shards.decode import decode_rgb
from tailwise.steps.embedding.column import BATCH_SIZES
from tailwise.steps.embedding.embed import embed

TIMED_IMAGES = 128  # that decoding and preprocessing are timed on
CEILING_SECONDS = 6.0
BURST_SECONDS = 0.005  # a progress bar is told of all samples of a batch, or of several batches, at once


def main() -> None:
    logging.disable(logging.WARNING)
    arguments = parse()
    device = torch.device("cuda:0" if torch.cuda.is_available() and arguments.device != "cpu" else "cpu")
    batch_size = arguments.batch_size or BATCH_SIZES[device.type]
    images = arguments.images or (320 if device.type == "cpu" else 16_384)
    precisions = ["fp32", "bf16"] if has_native_bf16(device) or device.type == "cpu" else ["fp32", "fp16"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print_header(f"embed {images:,} images, on {name}", "torch", "open_clip_torch", "transformers", "webdataset")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tars = arguments.pool or pools.source(place)
        samples = islice(cycle(pools.read_samples(tars)), images)
        renamed = (
            (f"{at:08d}", pools.enlarged(image, arguments.side), text) for at, (_, image, text) in enumerate(samples)
        )
        pool = pools.write_tars(renamed, place / "pool", max(batch_size, -(-images // 4)))
        print(f"{tars} at {arguments.side} px, 4 shards, batches of {batch_size}")
        print(f"native bf16: {has_native_bf16(device)}")
        for model, spelt in models(place, device).items():
            for workers in arguments.workers or [default_workers()]:
                measure(model, spelt, pool, place, device, precisions, batch_size, workers, arguments.rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path)
    parser.add_argument("--images", type=int)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--workers", type=int, nargs="*")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


def models(place: Path, device: torch.device) -> dict[str, str]:
    """{name: what `--encoder` takes}, with random weights, saved as their libraries save them."""
    if device.type == "cpu":
        return {"ViT-B/32": saved_clip("ViT-B-32", place)}
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    dino = place / "dinov2-base"
    Dinov2Model(Dinov2Config(image_size=518)).save_pretrained(dino)
    BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}).save_pretrained(dino)
    return {"ViT-B/16": saved_clip("ViT-B-16", place), "DINOv2-base": f"transformers:{dino}"}


def saved_clip(name: str, place: Path) -> str:
    folder = place / name
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip.get_model_config(name)}))
    torch.save(open_clip.create_model(name).state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"open_clip:local-dir:{folder}"


def measure(
    model: str,
    spelt: str,
    pool: Path,
    place: Path,
    device: torch.device,
    precisions: list[str],
    batch_size: int,
    workers: int,
    rounds: int,
) -> None:
    contents = [image for _, image, _ in islice(pools.read_samples(pool), max(TIMED_IMAGES, batch_size))]
    print(f"\n{model}, {workers} workers")
    found: dict[str, list[float]] = {}
    for turn in range(rounds):
        for precision in precisions:
            encoder = load_encoder(spelt, EncoderRequest(precision=precision, backend="torch"), device)
            found.setdefault(f"ceiling {precision}", []).append(ceiling(encoder, contents[:batch_size]))
            if turn == 0:
                print_shares(encoder, contents[:TIMED_IMAGES], found[f"ceiling {precision}"][0])
            del encoder
            run = partial(
                ours, pool, place / f"{model.replace('/', '-')}-{workers}-{precision}-{turn}", spelt, precision
            )
            found.setdefault(f"embed {precision}", []).append(run(device, batch_size, workers))
            if spelt.startswith("open_clip"):
                peer = partial(theirs, pool, spelt.removeprefix("open_clip:"), precision, device, batch_size, workers)
                found.setdefault(f"peer {precision}", []).append(peer())
    print_rates({name: statistics.median(rates) for name, rates in found.items()}, precisions)


def print_rates(rates: dict[str, float], precisions: list[str]) -> None:
    for precision in precisions:
        top = rates[f"ceiling {precision}"]
        for what in ("ceiling", "embed", "peer"):
            if (rate := rates.get(f"{what} {precision}")) is not None:
                print(f"  {precision} {what:<8} {rate:10,.1f} img/s   {rate / top:6.1%} of the ceiling")
        if f"peer {precision}" in rates:
            print(f"  {precision} embed / peer {rates[f'embed {precision}'] / rates[f'peer {precision}']:.2f}")
    first, second = precisions
    print(f"  embed {second} / {first}: {rates[f'embed {second}'] / rates[f'embed {first}']:.2f}")
    if f"peer {first}" in rates:
        print(f"  embed {second} / peer {first}: {rates[f'embed {second}'] / rates[f'peer {first}']:.2f}")


def ceiling(encoder: Encoder, contents: list[bytes]) -> float:
    """img/s of the model on one batch that lies on the device."""
    tensors = encoder.sides["image"].prepare(contents).tensors
    placed = {name: value.to(encoder.device) for name, value in tensors.items()}
    seconds = []
    begun = time.perf_counter()
    while len(seconds) < 3 or time.perf_counter() - begun < CEILING_SECONDS:
        start = time.perf_counter()
        encoder.embed("image", placed).cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return len(contents) / statistics.median(seconds[1:])


def print_shares(encoder: Encoder, contents: list[bytes], rate: float) -> None:
    """What an image costs, by one thread but for the model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    decoded = [decode_rgb(content) for content in contents]
    decoding = (time.perf_counter() - start) / len(contents)
    images = [image for image in decoded if isinstance(image, Image.Image)]
    start = time.perf_counter()
    encoder.sides["image"].prepare.preprocess(images)
    preprocessing = (time.perf_counter() - start) / len(images)
    torch.set_num_threads(threads)
    parts = {"decode": decoding, "preprocess": preprocessing, "model": 1 / rate}
    total = sum(parts.values())
    said = ", ".join(f"{name} {cost * 1e3:.2f} ms ({cost / total:.1%})" for name, cost in parts.items())
    print(f"  {encoder.precision}: an image costs {said}")


class Clock:
    """Notes when samples are done, as a progress bar would be told."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def track(self, items, description, total=None) -> Iterator:  # noqa: ARG002
        """A `Track`."""
        for item in items:
            self.times.append(time.perf_counter())
            yield item

    def rate(self) -> float:
        """Samples a second, without those that were done first, all at once."""
        first = sum(at - self.times[0] < BURST_SECONDS for at in self.times)
        return (len(self.times) - first) / (self.times[-1] - self.times[first - 1])


def ours(
    pool: Path, place: Path, spelt: str, precision: str, device: torch.device, batch_size: int, workers: int
) -> float:
    catalog = tailwise.import_pool([str(pool)], place, workers=1).catalog
    clock = Clock()
    options = EmbedRequest(
        encoder="", column="image", device=str(device), precision=precision, backend="torch", batch_size=batch_size
    )
    embed(catalog, replace(options, encoder=spelt, workers=workers), context=Context(clock.track))
    return clock.rate()


def theirs(pool: Path, model: str, precision: str, device: torch.device, batch_size: int, workers: int) -> float:
    network, _, transform = open_clip.create_model_and_transforms(model, device=device)
    network.eval()
    urls = sorted(map(str, pool.glob("*.tar")))
    dataset = wds.WebDataset(urls, shardshuffle=False).map(seen_by(transform))
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=2,
    )
    lower = torch.bfloat16 if precision == "bf16" else torch.float16
    clock, rows = Clock(), []
    with torch.no_grad(), nullcontext() if precision == "fp32" else torch.autocast(device.type, lower):
        for batch in loader:
            features = network.encode_image(batch.to(device))
            features = features / features.norm(dim=-1, keepdim=True)
            rows.append(features.cpu().to(torch.float16).numpy())
            clock.times += [time.perf_counter()] * len(batch)
    return clock.rate()


def seen_by(transform: Callable) -> Callable:
    return partial(_transformed, transform)


def _transformed(transform: Callable, sample: dict) -> torch.Tensor:
    import io

    return transform(Image.open(io.BytesIO(sample["jpg"])))


if __name__ == "__main__":
    main()
