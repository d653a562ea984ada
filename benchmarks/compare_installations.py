"""Compare two versions of tailwise: all commands over the same pools, and whether what must not change is the same.

BEFORE and AFTER are source folders (…/src). Each runs in a process of its own, by this Python. Labels, drop lists, scores, draws, exports,
batches and figures of --json are compared: arrays by dtype and values, Parquet files by columns and rows, tars by members, other
files by bytes. Figures that only AFTER prints are not compared, nor are messages. Artifacts are read through each version's own
Python classes, so that the layout of the catalog may differ. Options have their old spellings, which both versions know.
The made-up pools: tars with captions, duplicates and embeddings; DataComp metadata with .npz files; tars that are embedded here.
Prints one line for each comparison; exit code 1 if any differs. Not run: demo, compare, relocate; train and evaluate only with --train.
usage: compare_installations.py BEFORE AFTER [--pool SOURCE [SOURCE ...]] [--only POOL ...] [--train] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

EPOCHS = (0, 1, 2, 7)
DIMENSION, SHARD_SAMPLES, PART_ROWS = 32, 120, 250
WORDS = ("a", "red", "blue", "green", "dog", "cat", "house", "car", "tree", "photo", "of", "the", "old", "new", "small")
ASIDE = {"seconds", "date", "files"}  # figures that no two runs, or no two layouts, share
# Wordings that have changed, and mean the same: what else differs must not be lost among them.
REWORDED = {r"(not among the \w+ [\d.]+) of all\b": r"\1 of the pool"}
NO_OPTION = "no such option"
SHOWN = 3  # differences of one comparison

PLANS = {
    "dbp": "--method dbp --keep 0.277",
    "dynamics": "--method dynamics --keep 0.5 --alpha 0.2",
    "repeats": "--method dynamics --keep 0.5 --max-repeats 3 --clusters fine --seed 5",
    "annealed": "--method dynamics --keep 0.4 --alpha 0 --alpha-end 1 --anneal-epochs 3",
    "bernoulli": "--method dynamics --keep 0.5 --draw bernoulli",
    "static": "--method dynamics --keep 0.5 --static",
    "dbp-dynamic": "--method dbp-dynamic --keep 0.5",
    "density": "--method density --keep 0.5 --clusters dense",
    "flat": "--method flat --per-cluster 9",
    "proportional": "--method proportional --keep 0.5",
    "random": "--method random --keep 0.5",
    "ssp": "--method ssp --keep 0.3 --pick easiest --min-per-cluster 1",
    "cap": "--method cap --per-cluster 9",
    "top": "--method top-score --score caption-characters --keep 0.3",
    "highest": "--method dbp --keep 0.3 --pick highest --score caption-characters",
    "by-shard": "--method dynamics --keep 0.5 --clusters shard",
    "left": "--method dynamics --budget 300 --clusters unique --without duplicates",
    "filtered": "--method random --budget 300 --without duplicates --without words",
    "text": "--entries entries.txt --budget 300",
    "given": "--rates dynamics-1.json",
}
QUICK = {"dynamics", "left", "given"}
SCORES = {
    "caption-characters": {},
    "caption-words": {},
    "width": {},
    "height": {},
    "pixels": {},
    "aspect-ratio": {},
    "image-bytes": {},
    "clip-score": {},
    "cliploss": {"batch_size": 128, "repetitions": 2},
    "normsim": {"target": "target.npy"},
}
FILTERS = (
    "--by caption-characters --keep 0.7 --name characters",
    "--by caption-words --min 3 --max 8 --name words --without duplicates",
    "--by image-bytes --keep-lowest 0.8 --name bytes",
    "--by clip-score --keep 0.5",
    "--by cliploss --keep 0.5 --batch-size 128 --repetitions 2",
    "--by normsim --target target.npy --norm inf --keep 0.5",
    "--by number --file values.parquet --min 0.4",
)
EXPORTS = {"datacomp": "npy", "rates-json": "json", "keys": "txt", "parquet": "parquet", "shards": ""}
RECIPE = """
name: all
about: a short pipeline
catalog: by-recipe
output: by-recipe-exports
sources: [{sources}]
steps:
  - import:
{embed}  - cluster: {{clusters: 10, name: fine}}
  - dedup: {{epsilon: 0.05, clusters-name: fine}}
  - cluster: {{clusters: 8, without: duplicates}}
  - plan: {{name: epochs, method: dynamics, budget: 200, without: duplicates}}
  - draw: {{name: epochs, epoch: 2, output: drawn.parquet}}
  - removed: {{plan: epochs, output: removed.parquet}}
"""
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


class Pool(NamedTuple):
    """Sources, as `import` takes them; `later` are imported when all else was made from the first."""

    name: str
    sources: list[str]
    later: list[str]
    part_rows: int | None = None
    quick: bool = False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="source folder of the one version")
    parser.add_argument("after", type=Path, metavar="AFTER", help="source folder of the other")
    parser.add_argument(
        "--pool", nargs="+", action="append", default=[], metavar="SOURCE", help="a pool; may be given again"
    )
    parser.add_argument("--only", nargs="*", help="of the made-up pools: tars, metadata, images; all by default")
    parser.add_argument("--train", action="store_true", help="also train and evaluate a tiny model on the first pool")
    parser.add_argument("--quick", action="store_true", help="smaller made-up pools, and few plans and filters")
    options = parser.parse_args()
    for source in (options.before, options.after):
        if not (source / "tailwise").is_dir():
            parser.error(f"{source} has no folder tailwise: give a source folder, such as checkout/src")
    with tempfile.TemporaryDirectory() as folder:
        pools = [
            pool
            for pool in make_pools(Path(folder), options.quick)
            if options.only is None or pool.name in options.only
        ]
        given = [[str(Path(each).absolute()) for each in sources] for sources in options.pool]
        pools += [Pool(f"pool {number}", sources, [], None, options.quick) for number, sources in enumerate(given, 1)]
        sides = (("before", options.before), ("after", options.after))
        with ThreadPoolExecutor(2) as both:
            waiting = [
                both.submit(results, source.resolve(), Path(folder) / side, pools, options.train)
                for side, source in sides
            ]
        found = [each.result() for each in waiting]
    return report(*found)


def results(source: Path, folder: Path, pools: Sequence[Pool], train: bool) -> dict[str, Any]:
    """All results of one version, by what they are of."""
    folder.mkdir()
    code = "import sys, compare_installations as it; it.record(*sys.argv[1:])"
    path = os.pathsep.join([str(source), str(Path(__file__).resolve().parent)])
    arguments = [str(source), json.dumps(pools), "train" * train]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, env=environment, check=True)
    return json.loads((folder / "results.json").read_text())


def report(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Prints all comparisons; what only AFTER can do is shown as new."""
    counts = {"same": 0, "differs": 0, "new": 0}
    for what in {**before, **after}:
        pair = before.get(what, NO_OPTION), after.get(what)
        found = list(differences(*pair))
        verdict = "new" if pair[0] == NO_OPTION else "differs" if found else "same"
        counts[verdict] += 1
        digests = [digest(json.dumps(each, sort_keys=True)) for each in pair]
        print(f"{verdict:8s}{' '.join(digests if verdict == 'differs' else digests[1:])}  {what}")
        for line in found[: SHOWN * (verdict == "differs")]:
            print(f"            {line}")
    print(", ".join(f"{count:,} {verdict}" for verdict, count in counts.items()))
    return int(counts["differs"] > 0)


def differences(before: Any, after: Any, at: str = "") -> Iterator[str]:
    """What differs, with both values. Figures that only AFTER has are left aside."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in before:
            yield from differences(before[name], after.get(name), f"{at}.{name}" if at else name)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{at}[{number}]")
    elif before != after:
        yield f"{at}: {str(before)[:200]} → {str(after)[:200]}"


# --- one version, in a process of its own -------------------------------------------------------------------------------


def record(source: str, pools: str, train: str) -> None:
    """Writes results.json. Called with the version's source folder first on the path."""
    import tailwise

    assert Path(tailwise.__file__).is_relative_to(source), f"{tailwise.__file__} is not of {source}"
    found: dict[str, Any] = {}
    for pool in (Pool(*each) for each in json.loads(pools)):
        folder = Path(pool.name.replace(" ", "-"))
        folder.mkdir()
        with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else moved(folder):
            version = Version(pool, found)
            version.follow()
            if train and version.readable:
                version.train()
                train = ""
    Path("results.json").write_text(json.dumps(found))


@contextlib.contextmanager
def moved(folder: Path) -> Iterator[None]:
    """contextlib.chdir of Python 3.11."""
    old = Path.cwd()
    os.chdir(folder)
    yield
    os.chdir(old)


class Version:
    """This version's results over one pool.

    Attributes:
        pool: which pool; its catalog lies in the working folder.
        found: results by what they are of.
        plans: names of those to make.
        readable: whether the pool has images.
        embeds: whether they are embedded here.
    """

    def __init__(self, pool: Pool, found: dict[str, Any]) -> None:
        import typer

        from tailwise.cli import app

        self.command: Any = typer.main.get_command(app)
        self.pool, self.found = pool, found
        self.plans = QUICK if pool.quick else {*PLANS}
        self.readable = self.embeds = False

    def note(self, what: str, value: Any) -> None:
        """Keeps a result."""
        name = f"{self.pool.name}: {what}"
        while name in self.found:
            name += ", again"
        self.found[name] = value

    @property
    def catalog(self):
        """The catalog, as it is now."""
        import tailwise

        return tailwise.Catalog.open("catalog")

    def run(self, line: str, *, as_json: bool = True) -> bool:
        """Runs a command and notes what it prints as JSON, or that it fails; returns whether it succeeds."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                self.command([*shlex.split(line), *["--json"] * as_json], standalone_mode=False)
        except Exception as error:  # noqa: BLE001  (whatever a command fails by)
            print(f"{self.pool.name}: {line}: {type(error).__name__}: {error}", file=sys.stderr)
            self.note(line, NO_OPTION if type(error).__name__ == "NoSuchOption" else "fails")
            return False
        text = reworded(said.getvalue().replace(str(Path.cwd()), "."))
        self.note(line, comparable(json.loads(text)) if as_json else "succeeds")
        return True

    def follow(self) -> None:
        """Runs all commands."""
        self.import_pool(self.pool.sources)
        self.rows = self.catalog.snapshot().rows
        self.readable = str(self.catalog.shards()["path"][0]).endswith(".tar")
        write_files(self.catalog, self.rows)
        self.group()
        self.drop()
        self.scores()
        self.plan()
        self.run("status catalog")
        self.run("verify catalog")
        for key in keys(self.catalog)[:: max(1, self.rows // 4)]:
            self.run(f"why catalog {shlex.quote(key)}")
        if self.pool.later:
            self.extend()
        self.remove()
        if not self.pool.quick:
            self.recipe()

    def import_pool(self, sources: Sequence[str]) -> None:
        """Imports, and embeds where there are no embeddings; notes samples and embeddings."""
        import tailwise

        if self.pool.part_rows:
            tailwise.import_pool(list(sources), "catalog", part_rows=self.pool.part_rows, workers=1)
        else:
            self.run(f"import {shlex.join(sources)} catalog")
        if self.embeds or not self.catalog.embedding_folder("image").exists():
            self.embeds = self.run("embed catalog --encoder pixels --workers 1")
        catalog = self.catalog
        snapshot = f"snapshot {catalog.snapshot().number}"
        tables = [catalog.samples(part) for part in catalog.parts()]
        for name in tables[0].column_names:
            column = pa.table({name: pa.chunked_array([chunk for table in tables for chunk in table[name].chunks])})
            self.note(f"{snapshot}: column {name}", of_table(column))
        for name in ("image", "text"):
            with contextlib.suppress(Exception):  # there is none
                parts = catalog.embedding_parts(name, catalog.snapshot())
                self.note(f"{snapshot}: {name} embeddings", of_array(np.concatenate(parts)))

    def labels(self, line: str, name: str) -> None:
        """Runs a command that makes a clustering, and notes its columns."""
        if not self.run(line):
            return
        for column in ("label", "rank", *["similarity"] * line.startswith("cluster")):
            if hasattr(self.catalog, "label_parts"):  # before 29 November 2026
                parts = list(self.catalog.label_parts(name, self.catalog.snapshot(), column))
            else:
                from tailwise.catalog.clusterings import Clustering

                parts = list(Clustering.open(self.catalog, name).parts(column))
            self.note(f"{line}: {column}", of_array(np.concatenate(parts)))

    def dropped(self, line: str, name: str) -> None:
        """Runs a command that makes a drop list, and notes what it drops, and why."""
        from tailwise.catalog.drops import DropList

        if self.run(line):
            made = DropList(self.catalog, name)
            self.note(f"{line}: rows", of_array(made.mask[:]))
            self.note(f"{line}: reasons", of_table(made.tables(slice(0, made.snapshot.rows))))

    def group(self) -> None:
        """Clusterings and groups."""
        k = max(4, min(300, self.rows // 40))
        self.labels(f"cluster catalog --clusters {k}", "main")
        self.labels(f"cluster catalog --clusters {2 * k} --merge 0.7 --name fine --seed 3 --iterations 5", "fine")
        self.labels(f"cluster catalog --clusters {k} --density auto --name dense --points-per-centroid 20", "dense")
        self.labels(f"cluster catalog --clusters {k} --column text --name text", "text")
        self.labels("group catalog --by shard", "shard")
        self.labels("group catalog --by language --file values.parquet --missing own-group", "language")
        self.labels("group catalog --entries entries.txt --ignore-case", "entries")

    def drop(self) -> None:
        """Drop lists, and a clustering without duplicates."""
        self.run("dedup catalog --suggest --clusters-name main")
        self.dropped("dedup catalog --epsilon 0.05 --clusters-name main", "duplicates")
        self.dropped("dedup catalog --epsilon 0.1 --clusters-name fine --rule any-earlier --name earlier", "earlier")
        self.dropped("dedup catalog --epsilon 0 --clusters-name fine --keep nearest --name identical", "identical")
        self.dropped("dedup catalog --epsilon 0.05 --keep random --seed 4 --name random", "random")
        self.dropped("dedup catalog --epsilon 0.05 --keep score --score caption-words --name best", "best")
        for options in FILTERS[: 2 if self.pool.quick else None]:
            words = options.split()
            name = words[words.index("--name") + 1] if "--name" in words else words[1]
            self.run(f"filter catalog {options.replace(f'--name {name}', '')} --dry-run")
            self.dropped(f"filter catalog {options}", name)
        k = max(4, min(300, self.rows // 50))
        self.labels(f"cluster catalog --clusters {k} --without duplicates --name unique", "unique")

    def scores(self) -> None:
        """Scores of all samples."""
        import tailwise
        from tailwise.steps.scoring.scores import score_parts

        for name, options in SCORES.items():
            request = tailwise.ScoreRequest(name, options)
            try:
                parts = list(score_parts(self.catalog, self.catalog.snapshot(), request))
            except tailwise.UserError:
                continue  # there is no such column; the filter has noted that
            self.note(f"score {name}", of_array(np.concatenate(parts)))

    def plan(self) -> None:
        """Plans, and all that is made from them."""
        for name, options in PLANS.items():
            if name in self.plans and self.run(f"plan catalog {name} {options}"):
                self.drawn(name)
                self.run(f"explain catalog {name} --epochs 4{' --clusters' * (name not in ('text', 'given'))}")
                self.exports(name, epoch=1)
                self.listed(f"removed catalog {name}", f"{name}.parquet")
                self.listed(f"removed catalog {name} --epochs 3", f"{name}-3.parquet")
        self.listed("removed catalog", "all.parquet")
        if self.readable:
            for name in sorted(self.plans & {"dynamics", "repeats", "bernoulli", "filtered", "given"}):
                for compose in ("shuffle", "spread", "diverse")[: 3 if name == "dynamics" else 1]:
                    self.batches(name, compose)

    def drawn(self, name: str, when: str = "") -> None:
        """Draws and rates of a plan."""
        import tailwise

        plan = tailwise.Plan(self.catalog, name)
        self.note(f"plan {name}{when}: draws", {epoch: of_array(plan.draw(epoch)) for epoch in EPOCHS})
        self.note(f"plan {name}{when}: rates", of_array(np.concatenate([plan.rate(span, 1) for span in plan.spans()])))
        if not when and self.run(f"draw catalog {name} --epoch 1 --output {name}-drawn.parquet", as_json=False):
            self.note(f"draw {name}: file", of_file(Path(f"{name}-drawn.parquet")))

    def exports(self, name: str, epoch: int) -> None:
        """One epoch of a plan in all formats."""
        for kind, suffix in EXPORTS.items():
            if suffix or self.readable:  # new shards need the bytes of the old ones
                self.export(name, kind, suffix, epoch)

    def export(self, name: str, kind: str, suffix: str, epoch: int) -> None:
        """One epoch of a plan in one format."""
        output = f"{name}-{epoch}.{suffix}" if suffix else f"{name}-{epoch}"
        sharding = "" if suffix else "--shard-samples 100 --workers 1"
        if self.run(f"export catalog {name} {output} --to {kind} --epoch {epoch} {sharding}"):
            self.note(f"export {output}: files", of_file(Path(output)))

    def listed(self, line: str, output: str) -> None:
        """The samples that are never drawn."""
        if self.run(f"{line} --output removed-{output}"):
            self.note(f"{line}: file", of_file(Path(f"removed-{output}")))

    def batches(self, name: str, compose: str = "shuffle", when: str = "") -> None:
        """One epoch of the loader: alone, with a transform, and resumed."""
        import tailwise

        plan = tailwise.Plan(self.catalog, name)
        what = f"loader {name} {compose}{when}"
        for about, options in {
            "plain": {"lanes": 8, "seed": 2},
            "transformed": {"lanes": 4, "transform": transform, "workers": 1 if compose == "shuffle" else 0},
            "default": {"batch_size": 64, "first_epoch": 1},
        }.items():
            loader = tailwise.Loader(plan, **{"batch_size": 32, "compose": compose, **options})
            found = [of_batch(batch) for batch in loader.epoch(1)]
            loader.close()
            self.note(f"{what} {about}", {"batches": len(found), "digest": digest("".join(found))})
        first = tailwise.Loader(plan, batch_size=32, compose=compose, lanes=8)
        batches = iter(first)
        for _ in range(3):
            next(batches)
        second = tailwise.Loader(plan, batch_size=32, compose=compose, lanes=8)
        second.load_state_dict(first.state_dict())
        self.note(f"{what} resumed", of_batch(next(iter(second))))

    def extend(self) -> None:
        """Imports the later sources, and extends clustering and duplicates."""
        self.import_pool(self.pool.later)
        self.labels("cluster catalog --extends main --name main-2", "main-2")
        self.dropped(
            "dedup catalog --epsilon 0.05 --clusters-name main-2 --extends duplicates --name duplicates-2",
            "duplicates-2",
        )
        self.run("plan catalog extended --method dynamics --budget 400 --clusters main-2 --without duplicates-2")
        self.drawn("extended")
        self.drawn("dynamics", " after import")

    def remove(self) -> None:
        """Removes samples; draws, exports and clusters again."""
        Path("takedown.txt").write_text("\n".join([*keys(self.catalog)[3::7], "unknown-key"]))
        self.run("remove catalog --keys takedown.txt --dry-run")
        self.run("remove catalog --keys takedown.txt --reason opt-out")
        for name in sorted(self.plans & {"dbp", "dynamics", "filtered", "given"}):
            self.drawn(name, " after remove")
            self.exports(name, epoch=2)
            self.listed(f"removed catalog {name}", f"{name}-after.parquet")
        if self.readable:
            self.batches("dynamics", when=" after remove")
        self.labels("cluster catalog --clusters 8 --name after", "after")
        self.run("plan catalog after --method dynamics --budget 200 --clusters after")
        self.drawn("after")
        self.run("status catalog")
        self.run(f"why catalog {shlex.quote(keys(self.catalog)[3])}")

    def recipe(self) -> None:
        """A pipeline of its own, into another catalog."""
        sources = ", ".join(json.dumps(each) for each in self.pool.sources)
        embed = "  - embed: {encoder: pixels}\n" * self.embeds
        Path("recipe.yaml").write_text(RECIPE.format(sources=sources, embed=embed))
        if self.run("run recipe.yaml --workers 1", as_json=False):
            for name in ("drawn", "removed"):
                self.note(f"run recipe.yaml: {name}", of_file(Path(f"by-recipe-exports/{name}.parquet")))

    def train(self) -> None:
        """A tiny model: its batches, weights and accuracy."""
        Path("open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
        model = "--model local-dir:."
        line = (
            "train catalog dynamics --samples-seen 640 --record record --checkpoint-every 5 --seed 1 -- "
            f"{model} --batch-size 64 --lr 1e-3 --warmup 5 --workers 1 --logs logs --name tiny --precision fp32"
        )
        done = subprocess.run(
            [sys.executable, "-m", "tailwise", *line.split()], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr)
            self.note("train", "fails")
            return
        self.note("train: record", of_file(next(Path("record").glob("*.jsonl"))))
        import torch

        checkpoint = sorted(Path("logs/tiny/checkpoints").glob("epoch_*.pt"))[-1]
        weights = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]
        self.note("train: weights", digest(*(of_array(each.numpy()) for each in weights.values())))
        write_set(Path("set"))
        self.run(f"evaluate {checkpoint} {model} --data set --workers 1 --bootstrap 50")


def keys(catalog) -> list[str]:
    return [key for part in catalog.parts() for key in catalog.samples(part, ["key"]).column(0).to_pylist()]


def write_files(catalog, rows: int) -> None:
    """The files that commands take beside the pool: values by key, entries, and a target set."""
    random = np.random.default_rng(5)
    languages = random.choice(["en", "de", "fr", "rare"], rows, p=[0.6, 0.25, 0.14, 0.01])
    table = {"key": keys(catalog), "language": languages, "number": random.random(rows)}
    pq.write_table(pa.table(table).slice(rows // 20), "values.parquet")
    captions = [text for part in catalog.parts() for text in catalog.samples(part, ["caption"]).column(0).to_pylist()]
    words = Counter(" ".join(filter(None, captions)).split())
    Path("entries.txt").write_text("\n".join([*(word for word, _ in words.most_common(15)), "old house"]))
    image = next(iter(catalog.embedding_parts("image", catalog.snapshot())))
    np.save("target.npy", np.nan_to_num(np.asarray(image[:40], np.float32)))


def transform(image):
    """Pixels of a small copy, with noise by torch's and NumPy's own random numbers."""
    import torch

    pixels = torch.from_numpy(np.array(image.resize((8, 8)), np.float32))
    return pixels + torch.rand(()) + float(np.random.random())  # noqa: NPY002  (as augmentations use them)


def write_set(folder: Path) -> None:
    """An evaluation set in clip_benchmark's layout: three classes of flat colours."""
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("red\nblue\ngreen\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n")
    (folder / "test" / "nshards.txt").write_text("1\n")
    members = {}
    for number in range(30):
        colour = tuple(200 if channel == number % 3 else 20 + number for channel in range(3))
        members |= {f"{number:03d}.jpg": jpeg(np.full((32, 32, 3), colour, np.uint8))}
        members |= {f"{number:03d}.cls": str(number % 3).encode()}
    write_tar(folder / "test" / "0.tar", members)


# --- digests ------------------------------------------------------------------------------------------------------------


def digest(*texts: str | bytes) -> str:
    made = hashlib.sha256()
    for text in texts:
        content = text.encode() if isinstance(text, str) else text
        made.update(len(content).to_bytes(8, "little") + content)
    return made.hexdigest()[:12]


def of_array(values: np.ndarray) -> str:
    return f"{values.dtype} {list(values.shape)} {digest(np.ascontiguousarray(values).tobytes())}"


def of_table(table: pa.Table) -> str:
    columns = [f"{field.name} {field.type}" for field in table.schema]
    return f"{table.num_rows} rows of {', '.join(columns)} {digest(reworded(repr(table.to_pylist())))}"


def of_batch(batch) -> str:
    import torch

    images = [batch.images.numpy().tobytes()] if isinstance(batch.images, torch.Tensor) else batch.images
    encoded = [each if isinstance(each, bytes) else np.asarray(each).tobytes() for each in images]
    numbers = [of_array(each.numpy()) for each in (batch.rows, batch.epochs, batch.positions)]
    return digest(*encoded, *batch.texts, *numbers, repr([tuple(each) for each in batch.replaced]))


def of_file(path: Path) -> Any:
    """Of a folder: of all files, by name."""
    if path.is_dir():
        return {each.name: of_file(each) for each in sorted(path.iterdir())}
    if path.suffix == ".parquet":
        return of_table(pq.read_table(path))
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
        return f"{len(members)} members {digest(*(text for member in members for text in member))}"
    return f"{path.stat().st_size} bytes {digest(path.read_bytes())}"


def reworded(text: str) -> str:
    for before, after in REWORDED.items():
        text = re.sub(before, after, text)
    return text


def comparable(value: Any) -> Any:
    """JSON values without those of ASIDE."""
    if isinstance(value, list):
        return [comparable(each) for each in value]
    if isinstance(value, dict):
        return {name: comparable(each) for name, each in value.items() if name not in ASIDE}
    return value


# --- the made-up pools --------------------------------------------------------------------------------------------------


def make_pools(folder: Path, quick: bool = False) -> list[Pool]:
    random = np.random.default_rng(0)
    shards = 5 if quick else 9
    rows = shards * SHARD_SAMPLES
    sizes = 1 / np.arange(1, 21)
    centres = random.normal(size=(20, DIMENSION))
    image = centres[random.choice(20, rows, p=sizes / sizes.sum())] + 0.5 * random.normal(size=(rows, DIMENSION))
    pixels = random.integers(0, 256, (rows, 4, 4, 3), np.uint8)
    twins = random.permutation(rows)[: rows // 5].reshape(2, -1)
    image[twins[0]] = image[twins[1]] + random.choice([0, 0.02], (twins.shape[1], 1)) * random.normal(
        size=(1, DIMENSION)
    )
    pixels[twins[0]] = pixels[twins[1]]
    text = image + random.normal(size=image.shape)
    unit = [(each / np.linalg.norm(each, axis=1, keepdims=True)).astype(np.float16) for each in (image, text)]
    captions = [" ".join(random.choice(WORDS, 1 + random.integers(10))) for _ in range(rows)]
    for shard, start in enumerate(range(0, rows, SHARD_SAMPLES)):
        span = slice(start, start + SHARD_SAMPLES)
        time = "first" if shard < shards - 2 else "later"
        write_shard(folder / "tars" / time, shard, pixels[span], captions[span], [each[span] for each in unit])
        write_metadata(folder / "metadata" / time, shard, captions[span], [each[span] for each in unit])
    tars = {
        time: [str(folder / "tars" / time / each) for each in ("tars", "embeddings")] for time in ("first", "later")
    }
    return [
        Pool("tars", tars["first"], tars["later"], PART_ROWS, quick),
        Pool("metadata", [str(folder / "metadata" / "first")], [str(folder / "metadata" / "later")], PART_ROWS, quick),
        Pool("images", tars["first"][:1], [], None, quick),
    ]


def write_shard(folder: Path, shard: int, pixels: np.ndarray, captions: list[str], unit: list[np.ndarray]) -> None:
    """One tar, and its embeddings in clip-retrieval's layout, in another order."""
    names = [f"{shard:03d}{number:05d}" for number in range(len(captions))]
    members: dict[str, bytes] = {}
    for name, image, caption in zip(names, pixels, captions, strict=True):
        uid = json.dumps({"uid": digest(name, "uid").zfill(32)})
        members |= {f"{name}.jpg": jpeg(image), f"{name}.txt": caption.encode(), f"{name}.json": uid.encode()}
    write_tar(folder / "tars" / f"{shard:05d}.tar", members)
    order = np.random.default_rng(shard).permutation(len(names))
    for column, rows in zip(("img", "text"), unit, strict=True):
        (folder / "embeddings" / f"{column}_emb").mkdir(parents=True, exist_ok=True)
        np.save(folder / "embeddings" / f"{column}_emb" / f"{column}_emb_{shard}.npy", rows[order])
    (folder / "embeddings" / "metadata").mkdir(exist_ok=True)
    table = pa.table({"image_path": [names[at] for at in order]})
    pq.write_table(table, folder / "embeddings" / "metadata" / f"metadata_{shard}.parquet")


def write_metadata(folder: Path, shard: int, captions: list[str], unit: list[np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(shard)
    table = {
        "uid": [f"{shard:016x}{number:016x}" for number in range(len(captions))],
        "text": captions,
        "original_width": random.integers(100, 2000, len(captions)),
        "original_height": random.integers(100, 2000, len(captions)),
        "clip_l14_similarity_score": random.normal(0.2, 0.05, len(captions)),
    }
    pq.write_table(pa.table(table), folder / f"{shard:04d}.parquet")
    np.savez(folder / f"{shard:04d}.npz", l14_img=unit[0], l14_txt=unit[1])


def jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    sys.exit(main())
