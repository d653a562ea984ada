"""The pools that the loader's benchmarks read: the real one if it lies beside the repository, else the demo's.

Images can be enlarged and samples re-ordered. Everything is written into a temporary folder; no image stays.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from PIL import Image

import tailwise
from tailwise.demo.pool import make_pool
from tailwise.requests import ClusterRequest, EmbedRequest
from tailwise.steps.embedding.embed import embed

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyimagenet-lt"
Sample = tuple[str, bytes, bytes]  # key, encoded image, caption


def source(folder: Path) -> Path:
    """The folder of tars: the real pool's, or a demo pool made in `folder`."""
    if REAL.is_dir():
        return REAL / "train"
    make_pool(folder / "demo", images=24_000, concepts=200, shards=10)
    return folder / "demo"


def pool_name() -> str:
    return "the real pool (64 px JPEGs)" if REAL.is_dir() else "the demo's drawn pool (64 px JPEGs)"


def classes(tars: Path) -> dict[str, str]:
    """The class of each key; for measuring only."""
    table = REAL / "truth.tsv" if REAL.is_dir() else tars / "concepts.tsv"
    lines = table.read_text().splitlines()[1:]
    return dict(line.split("\t")[:2] for line in lines)


def read_samples(tars: Path) -> Iterator[Sample]:
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as tar:
            images: dict[str, bytes] = {}
            for member in tar:
                key, extension = member.name.rsplit(".", 1)
                if extension == "jpg":
                    images[key] = tar.extractfile(member).read()
                elif extension == "txt":
                    yield key, images.pop(key), tar.extractfile(member).read()


def write_tars(samples: Iterable[Sample], folder: Path, per_tar: int, *, uids: bool = False) -> Path:
    """Writes tars of `per_tar` samples, in the given order; with `uids`, each sample has one in its .json."""
    folder.mkdir(parents=True)
    samples = iter(samples)
    number = 0
    while first := list(islice(samples, 1)):
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, image, caption in chain(first, islice(samples, per_tar - 1)):
                uid = hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()
                extra = [("json", f'{{"uid": "{uid}"}}'.encode())] if uids else []
                for extension, content in (("jpg", image), ("txt", caption), *extra):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        number += 1
    return folder


def enlarged(image: bytes, side_px: int) -> bytes:
    """The image at `side_px`² pixels, JPEG quality 90; as it is at 64."""
    if side_px == 64:
        return image
    stream = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").resize((side_px, side_px), Image.Resampling.BICUBIC).save(
        stream, "JPEG", quality=90
    )
    return stream.getvalue()


def clustered(tars: Path, folder: Path, clusters: int = 400) -> tailwise.Catalog:
    """A catalog of tars whose keys are the source's, with embeddings and clusters, merged at 0.7."""
    sources = [tars, REAL / "embeddings"] if REAL.is_dir() else [tars]
    catalog = tailwise.import_pool(sources, folder).catalog
    if not REAL.is_dir():
        embed(catalog, EmbedRequest(encoder="pixels"))
    tailwise.cluster(catalog, ClusterRequest(k=clusters, merge=0.7))
    return catalog
