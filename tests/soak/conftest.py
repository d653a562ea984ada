"""Kills, full disks and damage over all commands. `make soak` runs all of it; `make test` runs a tenth (TAILWISE_SOAK=0.1)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCALE = float(os.environ.get("TAILWISE_SOAK", "0.1"))
MODULES = (
    "torch",
    "numba",
    "pyarrow.parquet",
    "pyarrow.dataset",
    "PIL.Image",
    "tailwise.stages.cluster",
    "tailwise.plan.plan",
)


class Runner:
    """A process that runs commands in forked children (runner.py)."""

    def __init__(self, folder, namespace=False):
        # A user who is no administrator may mount in a namespace of their own, where the system allows that.
        prefix = ["unshare", "--user", "--map-root-user", "--mount"] if namespace else []
        script = Path(__file__).with_name("runner.py")
        self.folder = folder
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(script), *MODULES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
        )
        assert json.loads(self.process.stdout.readline()) == "ready"

    def ask(self, operation, **request):
        self.process.stdin.write(json.dumps({"operation": operation, **request}, default=str) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer
        return answer["value"]

    def run(self, *argv, cwd, **options):
        """The outcome of one command: {code, late, events, seconds, peak_bytes, out, err}."""
        texts = {name: self.folder / name for name in ("out", "err")}
        return self.ask("run", argv=[str(word) for word in argv], cwd=cwd, **texts, **options)

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """A process that runs commands in forked children."""
    made = Runner(tmp_path_factory.mktemp("runner"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def disk_runner(tmp_path_factory):
    """A runner that can mount disks; skips where the system does not allow that."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare: full disks need a mount namespace")
    tried = subprocess.run(
        [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "mount",
            "-t",
            "tmpfs",
            "none",
            str(tmp_path_factory.mktemp("disk")),
        ],
        check=False,
        capture_output=True,
    )
    if tried.returncode:
        pytest.skip("no mount namespaces for this user: full disks are not tried")
    made = Runner(tmp_path_factory.mktemp("runner"), namespace=True)
    yield made
    made.close()


@pytest.fixture(scope="session")
def times():
    """`times(n)`: how many of the n trials of `make soak` this run makes."""
    return lambda n: max(1, round(n * SCALE))


@pytest.fixture(scope="session")
def note():
    """`note(kind, name, **figures)` adds a line to the log of `make soak`."""

    def write(kind, name, **figures):
        path = os.environ.get("TAILWISE_SOAK_LOG")
        if path:
            with Path(path).open("a") as log:
                log.write(json.dumps({"kind": kind, "name": name, **figures}) + "\n")

    return write


KEYS = [f"{number:06d}" for number in range(240)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_pool, make_tar, make_image, make_embeddings):
    """Six tars of 40 samples, with embeddings: near-duplicates in pairs, clusters of unequal sizes."""
    folder = tmp_path_factory.mktemp("sources")
    for shard, keys in enumerate(np.array_split(np.array(KEYS), 6)):
        members = [
            (f"{key}.{extension}", content)
            for key in keys.tolist()
            for extension, content in (
                ("jpg", make_image(int(key))),
                ("txt", f"a photo of {'cat' if int(key) % 3 else 'dog'} {key}".encode()),
            )
        ]
        make_tar(folder / "pool" / f"{shard:05d}.tar", members)
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((12, 16))
    vectors = centers[np.minimum(rng.geometric(0.3, 240) - 1, 11)] + 0.3 * rng.standard_normal((240, 16))
    vectors[1::8] = vectors[::8] + 0.001
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    make_embeddings(folder / "embeddings", dict(zip(KEYS, vectors.astype(np.float32), strict=True)), partitions=2)
    (folder / "optout.txt").write_text("\n".join(KEYS[5:9]) + "\n")
    (folder / "concepts.txt").write_text("cat\ndog\n")
    (folder / "kinds.tsv").write_text("key\tkind\n" + "".join(f"{key}\t{'ab'[int(key) % 2]}\n" for key in KEYS))
    return folder


# Each command of the library, and the commands that have to come before it. CAT: the catalog. SRC: the sources. OUT: a folder for outputs.
COMMANDS = {
    "import": ((), "import SRC/pool SRC/embeddings CAT"),
    "embed": (("import-bare",), "embed CAT --encoder pixels --workers 1"),
    "cluster-fine": (("import",), "cluster CAT --clusters 4 --name fine"),
    "dedup": (("import", "cluster-fine"), "dedup CAT --epsilon 0.01 --clusters-name fine"),
    "filter": (("import",), "filter CAT --by caption-characters --keep 0.8"),
    "cluster": (("import", "cluster-fine", "dedup"), "cluster CAT --clusters 12 --without duplicates"),
    "group-entries": (("import",), "group CAT --entries SRC/concepts.txt --name concepts"),
    "group-file": (("import",), "group CAT --by kind --file SRC/kinds.tsv --name kinds"),
    "plan-dynamics": (("import", "cluster-fine", "dedup", "cluster"), "plan CAT p --method dynamics --keep 0.4"),
    "plan-dbp": (("import", "cluster-fine", "dedup", "cluster"), "plan CAT q --method dbp --keep 0.3"),
    "draw": (
        ("import", "cluster-fine", "dedup", "cluster", "plan-dynamics"),
        "draw CAT p --epoch 2 --output OUT/drawn.parquet",
    ),
    "export-keys": (
        ("import", "cluster-fine", "dedup", "cluster", "plan-dynamics"),
        "export CAT p OUT/keys.txt --to keys --epoch 1",
    ),
    "export-rates": (
        ("import", "cluster-fine", "dedup", "cluster", "plan-dynamics"),
        "export CAT p OUT/rates.json --to rates-json",
    ),
    "export-parquet": (
        ("import", "cluster-fine", "dedup", "cluster", "plan-dynamics"),
        "export CAT p OUT/drawn --to parquet --epoch 1",
    ),
    "export-shards": (
        ("import", "cluster-fine", "dedup", "cluster", "plan-dynamics"),
        "export CAT p OUT/shards --to shards --epoch 1 --workers 1",
    ),
    "remove": (
        ("import", "cluster-fine", "dedup", "cluster", "plan-dynamics"),
        "remove CAT --keys SRC/optout.txt --reason asked",
    ),
    "removed": (
        ("import", "cluster-fine", "dedup", "cluster", "plan-dynamics", "remove"),
        "removed CAT p --output OUT/never.parquet",
    ),
    "relocate": (("import",), "relocate CAT SRC/pool MOVED/pool"),
}
BARE = "import SRC/pool CAT"


@pytest.fixture(scope="module")
def stage(tmp_path_factory, sources):
    """`stage(runner, name)` → (argv, base): a command, and the folder {cat, out} on which it has to run. Made once per module."""
    root = tmp_path_factory.mktemp("stages")
    moved = tmp_path_factory.mktemp("moved")
    shutil.copytree(sources / "pool", moved / "pool")
    made = {}

    def words(text, at):
        places = {"CAT": at / "cat", "OUT": at / "out", "SRC": sources, "MOVED": moved}
        return ["/".join(str(places.get(piece, piece)) for piece in word.split("/")) for word in text.split()]

    def base(runner, before, work):
        if before not in made:
            folder = root / f"{len(made):03d}"
            if before:
                runner.ask("copy", **{"from": base(runner, before[:-1], work), "to": work})
                text = BARE if before[-1] == "import-bare" else COMMANDS[before[-1]][1]
                done = runner.run(*words(text, work), cwd=work)
                assert done["code"] == 0, done
                runner.ask("copy", **{"from": work, "to": folder})
            else:
                (folder / "out").mkdir(parents=True)
            made[before] = folder
        return made[before]

    def find(runner, name, work):
        before, text = COMMANDS[name]
        return words(text, work), base(runner, before, work)

    return find


@pytest.fixture(scope="session")
def numbers():
    """`numbers(name)`: a generator of random numbers of its own for each test."""
    return lambda name: np.random.default_rng([int.from_bytes(name.encode()[:8].ljust(8, b"\0"), "little"), 7])


@pytest.fixture(scope="session")
def kept():
    """`kept(files, work)` → {place below `work`: hash}, without locks, a cache, and what a killed process leaves."""
    left = (".writing", "/.lock", "/out/tmp", "/removals/found/")
    return lambda files, work: {
        path.removeprefix(str(work)): value for path, value in files.items() if not any(part in path for part in left)
    }


@pytest.fixture(scope="module")
def full_catalog(stage):
    """`full_catalog(runner, text, work)` → (argv, base): a command over a catalog that has one of each kind of artifact."""
    COMMANDS["everything"] = (
        ("import", "cluster-fine", "dedup", "cluster", "group-file", "plan-dynamics", "remove"),
        "",
    )

    def find(runner, text, work):
        _, base = stage(runner, "everything", work)
        return [word.replace("CAT", str(work / "cat")).replace("OUT", str(work / "out")) for word in text.split()], base

    return find
