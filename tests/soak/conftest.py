"""Kills, full disks and damage over all commands. `make soak` runs all of it; `make test` runs a tenth (TAILWISE_SOAK=0.1)."""

from __future__ import annotations

import json
import os
import re
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
    "tailwise.steps.clustering.cluster",
    "tailwise.plan.plan",
    "tailwise.train.launch",
    "tailwise.compare.study",
    "open_clip_train.main",
    "scipy.stats",
)


class Runner:
    """A process that runs commands in forked children (runner.py)."""

    def __init__(self, folder, namespace=False):
        # A user who is no administrator may mount in a namespace of their own, where the system allows that.
        prefix = ["unshare", "--user", "--map-root-user", "--mount"] if namespace else []
        script = Path(__file__).with_name("runner.py")
        self.folder, self.namespace = folder, namespace
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
        """The outcome of one command: {code, hit, late, events, seconds, peak_bytes, out, err}."""
        texts = {name: self.folder / name for name in ("out", "err", "facts")}
        return self.ask("run", argv=[str(word) for word in argv], cwd=cwd, **texts, **options)

    def close(self):
        self.process.stdin.close()
        self.process.terminate()  # forks of this process, such as loaders' workers, may hold its input open
        self.process.wait(60)


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    """A process that runs commands in forked children."""
    made = Runner(tmp_path_factory.mktemp("runner"), may_mount(tmp_path_factory.mktemp("disk")))
    yield made
    made.close()


def may_mount(folder):
    """Return True if this user may mount disks in a namespace of their own."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", str(folder)]
    return bool(shutil.which("unshare")) and not subprocess.run(command, check=False, capture_output=True).returncode


@pytest.fixture(scope="session")
def disk_runner(runner):
    """The runner, which can mount disks; skips where the system does not allow that."""
    if not runner.namespace:
        pytest.skip("no mount namespaces for this user: full disks are not tried")
    return runner


@pytest.fixture(scope="session")
def times():
    """`times(n)`: how many of the n trials of `make soak` this run makes."""
    return lambda n: max(1, round(n * SCALE))


@pytest.fixture(scope="session")
def hits(times):
    """`hits(n, trial)` repeats trials until as many hit (return true) as this run makes of n → how many trials that took."""

    def repeat(n, trial):
        wanted, found, tried = times(n), 0, 0
        while found < wanted:
            assert tried < 20 * wanted, f"{found} hits of {tried} trials"
            found, tried = found + trial(), tried + 1
        return tried

    return repeat


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
MODEL = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
}
STUDY = """
name: soak
about: two plans
catalog:
evaluate: {data: SRC/set, workers: 1, bootstrap: 10}
train: {trainer: in-process, model: "local-dir:SRC/model", samples_seen: 64, global_batch: 16, device: cpu, warmup: 1, workers: 0}
seeds: [0]
baseline: random
rows:
  random: {method: random, keep: 0.5}
  dynamics: {method: dynamics, keep: 0.5}
"""
PIPELINE = """
name: soak
about: from import to export
steps:
- import: {workers: 1}
- cluster: {clusters: 8}
- plan: {name: p, method: dynamics, keep: 0.5}
- export: {name: p, output: keys.txt, to: keys, epoch: 0}
"""


@pytest.fixture(scope="session")
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
                ("json", json.dumps({"uid": f"{int(key):032x}"}).encode()),
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
    (folder / "captions.tsv").write_text("key\tcaption\n" + "".join(f"{key}\tnew {key}\n" for key in KEYS[::-2]))
    (folder / "kinds.tsv").write_text("key\tkind\n" + "".join(f"{key}\t{'ab'[int(key) % 2]}\n" for key in KEYS))
    (folder / "rates.json").write_text(json.dumps({key: int(key) % 5 / 4 for key in KEYS}))
    for number in range(24):
        path = folder / "set" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image(number, "PNG"))
    (folder / "model").mkdir()
    (folder / "model" / "open_clip_config.json").write_text(json.dumps(MODEL))
    (folder / "compare.yaml").write_text(STUDY.replace("SRC", str(folder)))
    (folder / "run.yaml").write_text(PIPELINE)
    return folder


# Each command of the library, and the commands that have to come before it. CAT: the catalog. SRC: the sources. OUT: a folder for outputs.
# Left out is demo, which runs import, embed, cluster, dedup, plan and compare.
CLUSTERED = ("import", "cluster-fine", "dedup", "cluster")
PLANNED = (*CLUSTERED, "plan-dynamics")
TRAINER = "--model local-dir:SRC/model --device cpu --precision fp32 --batch-size 16 --workers 0 --logs OUT --name run"
COMMANDS = {
    "import": ((), "import SRC/pool SRC/embeddings CAT --workers 1"),
    "import-workers": ((), "import SRC/pool SRC/embeddings CAT --workers 2"),
    "captions": (("import",), "captions CAT SRC/captions.tsv --name recap"),
    "captions-json": (("import",), "captions CAT json:uid --name uids"),
    "embed": (("import-bare",), "embed CAT --encoder pixels --workers 1"),
    "cluster-fine": (("import",), "cluster CAT --k 4 --name fine"),
    "dedup": (("import", "cluster-fine"), "dedup CAT --epsilon 0.01 --clustering fine"),
    "filter": (("import",), "filter CAT --by caption-characters --keep 0.8"),
    "cluster": (("import", "cluster-fine", "dedup"), "cluster CAT --k 12 --without duplicates"),
    "group-entries": (("import",), "group CAT --entries SRC/concepts.txt --name concepts"),
    "group-file": (("import",), "group CAT --by kind --file SRC/kinds.tsv --name kinds"),
    "plan-dynamics": (CLUSTERED, "plan CAT p --method dynamics --keep 0.4"),
    "plan-dbp": (CLUSTERED, "plan CAT q --method dbp --keep 0.3"),
    "plan-rates": (("import",), "plan CAT r --rates SRC/rates.json"),
    "plan-entries": (("import",), "plan CAT e --entries SRC/concepts.txt --per-entry 20"),
    "explain": (PLANNED, "explain CAT p"),
    "draw": (PLANNED, "draw CAT p --epoch 2 --output OUT/drawn.parquet"),
    "export-keys": (PLANNED, "export CAT p OUT/keys.txt --to keys --epoch 1"),
    "export-rates": (PLANNED, "export CAT p OUT/rates.json --to rates-json"),
    "export-parquet": (PLANNED, "export CAT p OUT/drawn --to parquet --epoch 1"),
    "export-datacomp": (PLANNED, "export CAT p OUT/uids.npy --to datacomp --epoch 1"),
    "export-shards": (PLANNED, "export CAT p OUT/shards --to shards --epoch 1 --workers 1"),
    "train": (PLANNED, f"train CAT p --samples-seen 64 --checkpoint-every 1 --resume -- {TRAINER} --warmup 1"),
    "evaluate": (
        (*PLANNED, "train"),
        "evaluate OUT/run --data SRC/set --workers 1 --bootstrap 10 --output OUT/evaluation",
    ),
    "compare": (CLUSTERED, "compare SRC/compare.yaml --set catalog=CAT --output OUT/compare"),
    "run": ((), "run SRC/run.yaml SRC/pool SRC/embeddings CAT --output OUT"),
    "status": (PLANNED, "status CAT"),
    "why": (PLANNED, "why CAT 000017"),
    "remove": (PLANNED, "remove CAT --keys SRC/optout.txt --reason asked"),
    "removed": ((*PLANNED, "remove"), "removed CAT p --output OUT/never.parquet"),
    "verify": ((*PLANNED, "remove"), "verify CAT"),
    "relocate": (("import",), "relocate CAT SRC/pool MOVED/pool"),
}
BARE = "import SRC/pool CAT --workers 1"


@pytest.fixture(scope="session")
def stage(tmp_path_factory, sources):
    """`stage(runner, name)` → (argv, base): a command, and the folder {cat, out} on which it has to run. Made once."""
    root = tmp_path_factory.mktemp("stages")
    moved = tmp_path_factory.mktemp("moved")
    shutil.copytree(sources / "pool", moved / "pool")
    made = {}

    def words(text, at):
        places = {"CAT": at / "cat", "OUT": at / "out", "SRC": sources, "MOVED": moved}
        return [re.sub(r"\b(CAT|OUT|SRC|MOVED)\b", lambda found: str(places[found[0]]), word) for word in text.split()]

    def base(runner, before, work):
        if before not in made:
            if before:
                runner.ask("copy", **{"from": base(runner, before[:-1], work), "to": work})
                text = BARE if before[-1] == "import-bare" else COMMANDS[before[-1]][1]
                done = runner.run(*words(text, work), cwd=work)
                assert done["code"] == 0, done
            folder = root / f"{len(made):03d}"  # a number of its own: those before it are made by now
            if before:
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
    """`kept(files, work)` → {place below `work`: hash}, without locks, caches, what a killed process leaves, and files that hold times."""
    left = (".writing", "/.lock", "/out/tmp", "/removals/found/", "/slots/", "/out.log")
    left += ("/run/params.txt",)  # open_clip's note of its arguments names the checkpoint that a run was resumed from
    # Of a comparison the weights, losses, guesses by class and plots are compared; these files tell seconds beside them.
    left += (
        "/compare/summary.",
        "/compare/results.csv",
        "/result.json",
        "/trained.json",
        "/compare/seconds/",
        "/cat/exports/",
    )
    return lambda files, work: {
        path.removeprefix(str(work)): value for path, value in files.items() if not any(part in path for part in left)
    }


@pytest.fixture(scope="session")
def full_catalog(stage):
    """`full_catalog(runner, text, work)` → (argv, base): a command over a catalog that has one of each kind of artifact."""
    COMMANDS["everything"] = (
        (*CLUSTERED, "group-file", "plan-dynamics", "remove"),
        "",
    )

    def find(runner, text, work):
        _, base = stage(runner, "everything", work)
        return [word.replace("CAT", str(work / "cat")).replace("OUT", str(work / "out")) for word in text.split()], base

    return find
