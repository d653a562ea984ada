"""DataComp's six baselines: `tailwise baselines` against the functions of DataComp's toolkit, on made-up metadata.

    python benchmarks/datacomp_baselines.py --toolkit datacomp/ [--rows 12800000] [--folder DIR]

The toolkit (github.com/mlfoundations/datacomp, a checkout) runs as it is, through its `apply_filter`, with as many workers as processors.
What it would download is replaced, for both sides: the language of a caption follows from its first letter (ours reads it in a column),
WordNet from a list of words, and a token is what ASCII white space separates. All of these are cheaper than the real ones. The list of
entities is a set, which the toolkit's is not: that would take it a hundred times longer. Its image filter needs CUDA: a NumPy function of
ten lines replaces it, in the toolkit's own pool of workers. Without --toolkit, only our side runs.

The metadata are shards of 10,000 rows, as large as DataComp's in all but the embeddings, of 64 dimensions. Vectors and centroids are on a
coarse grid, so that products in float32 are exact in any order, and both sides must agree on every row. They are made once, in --folder.

Memory is the sum of the proportional set sizes (PSS) of all processes of a side, asked ten times a second; "own" is the part of it that is
of no file.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from common import print_header

SHARD_ROWS, DIMENSION, CENTROIDS, TARGETS, CAPTIONS = 10_000, 64, 1_000, 500, 100_000
WORDS, ENTITIES = 50_000, 2_000
NAMES = ("basic_filter", "clip_score", "laion2b", "text_based", "image_based", "image_based_intersect_clip_score")
FOREIGN = "é"  # the first letter of captions that are not English

# What the toolkit imports and would download, for its worker processes too.
STUBS = {
    "fasttext.py": '''
import os, types
import baselines.utils
baselines.utils.download = lambda name, root=None: os.path.join(os.environ["BENCH_ASSETS"], name)
FastText = types.SimpleNamespace()
def tokenize(text):
    return text.split()
class _Model:
    def predict(self, text, k=1):
        if isinstance(text, str):
            return ("__label__xx" if text[:1] == "é" else "__label__en",), (1.0,)
        return [("__label__xx" if one[:1] == "é" else "__label__en",) for one in text], None
def load_model(path):
    return _Model()
''',
    "gcld3.py": '''
from types import SimpleNamespace
_FOUND = {True: SimpleNamespace(language="xx"), False: SimpleNamespace(language="en")}
class NNetLanguageIdentifier:
    def __init__(self, **_):
        pass
    def FindLanguage(self, text):
        return _FOUND[text[:1] == "é"]
''',
    "nltk/__init__.py": "def download(name):\n    pass\n",
    "nltk/corpus.py": '''
class _Synset:
    def __init__(self, number):
        self._number = number
    def offset(self):
        return self._number
class wordnet:
    @staticmethod
    def synsets(word):
        word = word.lower()
        return [_Synset(int(word[1:]))] if word[:1] == "w" and word[1:].isdigit() else []
''',
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256_000)
    parser.add_argument("--folder", type=Path, help="where the metadata is made, and kept")
    parser.add_argument("--toolkit", type=Path, help="a checkout of mlfoundations/datacomp")
    parser.add_argument("--peer", help=argparse.SUPPRESS)  # runs one baseline of the toolkit, in a process of its own
    asked = parser.parse_args()
    if asked.peer:
        run_peer(asked.peer, asked.folder)
        return
    print_header("DataComp's baselines", "pyarrow", "pandas", "torch")
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        make_metadata(folder, asked.rows)
        print(f"{asked.rows:,} rows, shards of {SHARD_ROWS:,}; {DIMENSION} dimensions, {CENTROIDS:,} centroids")
        ours = measure_ours(folder)
        if asked.toolkit is None:
            return
        theirs = [measure_peer(name, folder, asked.toolkit) for name in NAMES]
    seconds, cpu_seconds, memory, own = zip(*theirs, strict=True)
    peer = Cost(sum(seconds), sum(cpu_seconds), max(memory), max(own))
    print(f"toolkit, all six: {peer}")
    ratios = (theirs / ours for theirs, ours in zip(peer, ours, strict=True))
    print(
        "ratios: {:.1f} × the time, {:.1f} × the time of processors, {:.1f} × the memory (own: {:.1f} ×)".format(
            *ratios
        )
    )


# --- the metadata -----------------------------------------------------------------------------------------------------


def make_metadata(folder: Path, rows: int) -> None:
    """Make what is not there yet. A shard depends on nothing but its number."""
    (folder / "metadata").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    np.save(folder / "centroids.npy", coarse(rng.normal(size=(CENTROIDS, DIMENSION)), 256).astype(np.float32))
    np.save(folder / "target.npy", coarse(rng.normal(size=(TARGETS, DIMENSION)), 64).astype(np.float32))
    (folder / "words.txt").write_text("".join(f"w{number}\n" for number in range(ENTITIES)))
    (folder / "assets").mkdir(exist_ok=True)
    (folder / "assets" / "imagenet21k_wordnet_ids").write_text("".join(f"n{number}\n" for number in range(ENTITIES)))
    shards = [(number, min(SHARD_ROWS, rows - first)) for number, first in enumerate(range(0, rows, SHARD_ROWS))]
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(partial(make_shard, folder / "metadata"), shards, chunksize=8):
            pass


def coarse(rows: np.ndarray, steps: int) -> np.ndarray:
    """Scale rows to about unit norm, in multiples of 1 / steps."""
    return np.rint(rows / np.linalg.norm(rows, axis=1, keepdims=True) * steps) / steps


@cache
def captions() -> pa.StructArray:
    """Return captions of which shards draw: text, of 8 words on average, and whether it is not English."""
    rng = np.random.default_rng(3)
    foreign, counts = rng.random(CAPTIONS) < 0.55, np.minimum(rng.geometric(0.12, CAPTIONS), 60).tolist()
    ranks = ((rng.zipf(1.25, sum(counts)) * 37 + ENTITIES // 2) % WORDS).tolist()
    ends, texts = np.cumsum([0, *counts]).tolist(), []
    for at, is_foreign in enumerate(foreign.tolist()):
        words = (f"{'Wwt'[rank % 3]}{rank}" for rank in ranks[ends[at] : ends[at + 1]])
        texts.append((FOREIGN if is_foreign else "") + " ".join(words))
    return pa.StructArray.from_arrays([pa.array(texts), pa.array(foreign)], ["text", "foreign"])


def make_shard(folder: Path, shard: tuple[int, int]) -> None:
    number, rows = shard
    path = folder / f"{number:08d}.parquet"
    if path.exists():
        return
    rng = np.random.default_rng([2, number])
    drawn = rng.integers(0, CAPTIONS, rows)
    foreign = captions().field("foreign").to_numpy(zero_copy_only=False)[drawn]
    uids = rng.bytes(16 * rows).hex()
    l14 = rng.normal(0.2, 0.05, rows).astype(np.float32).astype(np.float64)
    width, height = (np.exp(rng.normal(6.2, 0.6, rows)).astype(np.int64) + 1 for _ in range(2))
    table = {
        "uid": [uids[32 * at : 32 * at + 32] for at in range(rows)],
        "url": [f"https://example.org/{number}/{at}.jpg" for at in range(rows)],
        "text": captions().field("text").take(pa.array(drawn)),
        "original_width": width,
        "original_height": height,
        "clip_b32_similarity_score": rng.normal(0.25, 0.05, rows),
        "clip_l14_similarity_score": np.rint(l14 * 4096) / 4096,  # many are equal
        "sha256": [f"{uids[32 * at : 32 * at + 32]}{at:032x}" for at in range(rows)],
        "language": np.where(foreign, "xx", "en").tolist(),
    }
    images = coarse(rng.normal(size=(rows, DIMENSION)), 64).astype(np.float16)
    np.savez_compressed(path.with_suffix(".npz"), l14_img=images)
    temporary = path.with_suffix(".temporary")
    pq.write_table(
        pa.table(table), temporary, use_dictionary=["language"]
    )  # captions of the real pool are no dictionary
    temporary.rename(path)


# --- measuring --------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What a side takes."""

    seconds: float
    cpu_seconds: float
    memory: float  # MB of PSS
    own: float  # MB of it that are of no file

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s ({self.cpu_seconds:.1f} s of processors), peak {self.memory:.0f} MB (own {self.own:.0f} MB)"


def measure(command: list[str], environment: dict[str, str]) -> Cost:
    """Run a command; return what it and all its processes take."""
    start, before, peaks = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN), [0.0, 0.0]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.1):
                found = memory_of(process.pid)
                peaks[:] = [max(pair) for pair in zip(peaks, found, strict=True)]

        watcher = threading.Thread(target=watch)
        watcher.start()
        output = process.stdout.read() if process.stdout else b""
        code = process.wait()
        seconds = time.perf_counter() - start
        ended.set()
        watcher.join()
    if code:
        raise SystemExit(output.decode())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, *peaks)


def memory_of(root: int) -> tuple[float, float]:
    """Return the PSS of a process and all its children in MB, and the part of it that is no file's."""
    total, own, tree = 0, 0, list[psutil.Process]()
    with suppress(psutil.Error):
        tree = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    for process in tree:
        lines = []
        with suppress(OSError):
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
        total += values.get("Pss", 0)
        own += values.get("Pss_Anon", 0) + values.get("Pss_Shmem", 0)
    return total / 1000, own / 1000


def measure_ours(folder: Path) -> Cost:
    files = {"--entities": "words.txt", "--centroids": "centroids.npy", "--target": "target.npy"}
    options = [word for name, file in files.items() for word in (name, str(folder / file))]
    places = [str(folder / "metadata"), str(folder / "ours"), "--language", "language", "--overwrite"]
    found = measure([sys.executable, "-m", "tailwise", "baselines", *places, *options], dict(os.environ))
    print(f"tailwise, all six in one command: {found}", flush=True)
    return found


def measure_peer(name: str, folder: Path, toolkit: Path) -> Cost:
    """Run a baseline of the toolkit; compare its uids with ours."""
    for file, text in STUBS.items():
        (folder / "stubs" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "stubs" / file).write_text(text)
    paths = [str(folder / "stubs"), str(toolkit), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    environment |= {"BENCH_ASSETS": str(folder / "assets"), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    (folder / "theirs").mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--peer", name, "--folder", str(folder)]
    found = measure(command, environment)
    ours, theirs = (np.load(folder / side / f"{name}.npy") for side in ("ours", "theirs"))
    verdict = "equal" if np.array_equal(ours, theirs) else "DIFFERENT"
    print(f"toolkit, {name}: {found}; {len(theirs):,} uids, {len(ours):,} of ours: {verdict}", flush=True)
    return found


# --- the toolkit's side -----------------------------------------------------------------------------------------------


def run_peer(name: str, folder: Path) -> None:
    """Run the toolkit's function for a baseline, with what it reads from `folder`."""
    import multiprocessing

    from baselines import apply_filter

    metadata, output, workers = str(folder / "metadata"), str(folder / "theirs" / f"{name}.npy"), os.cpu_count() or 1
    if not name.startswith("image_based"):
        settings = {"clip_score": {"arch": "l14", "threshold": None, "fraction": 0.3}}.get(name, {})
        base = {"name": name, "metadata_dir": metadata, "save_path": output, "num_workers": workers}
        apply_filter.partial = faster_partial
        apply_filter.apply_filter(argparse.Namespace(**base, **settings))
        return
    multiprocessing.set_start_method("spawn", force=True)
    threshold = None
    if name != "image_based":
        threshold = apply_filter.get_threshold(metadata, "clip_l14_similarity_score", 0.3, workers)
    centroids, target = np.load(folder / "centroids.npy"), np.load(folder / "target.npy")
    kept = np.unique(nearest(target, centroids))
    worker = partial(image_filter, centroids=centroids, kept=kept, threshold=threshold)
    paths = [str(path) for path in sorted(Path(metadata).glob("*.parquet"))]
    uids = apply_filter.worker_threadpool(worker, np.concatenate, paths, workers)
    uids.sort()
    np.save(output, uids)


def faster_partial(function, **settings):
    """Return a partial whose entities are a set."""
    return partial(function, **{key: set(value) if key == "entity_set" else value for key, value in settings.items()})


def nearest(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    chunks = (rows[start : start + 512].astype(np.float32) @ centroids.T for start in range(0, len(rows), 512))
    return np.concatenate([np.empty(0, np.int64), *(np.argmax(chunk, axis=1) for chunk in chunks)])


def image_filter(path: str, *, centroids: np.ndarray, kept: np.ndarray, threshold: float | None) -> np.ndarray:
    """Do what the toolkit's image filter does, without CUDA."""
    import fasttext
    import pandas as pd

    frame = pd.read_parquet(path, columns=["uid", "text", "clip_l14_similarity_score"][: 2 if threshold is None else 3])
    images = np.load(path.replace(".parquet", ".npz"))["l14_img"]
    if threshold is not None:
        mask = (frame["clip_l14_similarity_score"] >= threshold).to_numpy()
        frame, images = frame[mask], images[mask]
    words, characters = frame.text.apply(lambda text: len(fasttext.tokenize(text))), frame.text.apply(len)
    found, _ = fasttext.load_model("").predict([text.replace("\n", " ") for text in frame.text.values], k=1)
    english = np.array(
        [labels[0].replace("__label__", "") == "en" for labels in found], np.bool_
    )  # a list, which pandas 3 refuses
    mask = (english & (words > 1) & (characters > 5)).to_numpy()
    uids = frame["uid"][mask][np.isin(nearest(images[mask], centroids), kept)]
    return np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8"))


if __name__ == "__main__":
    main()
