"""The demo: from a pool of drawings to two ways of training on it, compared on a balanced test set."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tailwise.catalog import Catalog
from tailwise.catalog.drops import DropList
from tailwise.catalog.files import MANIFEST, read_json, write_json
from tailwise.catalog.outputs import check_output_folder
from tailwise.compare.recipe import CompareRecipe, load_compare_recipe
from tailwise.compare.study import Commands, Study, compare
from tailwise.demo.pool import concept_counts, make_pool, make_test_set
from tailwise.errors import UserError
from tailwise.evaluate.metrics import thirds
from tailwise.plan.plan import Plan
from tailwise.progress import Track
from tailwise.recipes.pipeline import Step
from tailwise.train.guard import INSTALL

FILES = Path(__file__).parent / "files"
CONCEPTS = 256
TESTED = 8
COPIED = 8  # one near-duplicate for so many images
SIDE_PX = 40  # the model sees 32


@dataclass(frozen=True)
class DemoCommands:
    """How the demo runs commands of tailwise.

    Attributes:
        quiet: runs them without a word.
        line: what a user would type for one.
    """

    quiet: Commands
    line: Callable[[Step], str]


@dataclass(frozen=True)
class DemoGroup:
    """A third of the concepts, by how many images the pool has of each.

    Attributes:
        concepts: how many.
        pool: share of the pool's samples, near-duplicates included.
        drawn: share of epoch 0, by row of the comparison.
    """

    concepts: int
    pool: float
    drawn: Mapping[str, float]


@dataclass(frozen=True)
class DemoResult:
    """What the demo shows.

    Attributes:
        folder: that it lies in.
        groups: "head", "medium" and "few".
        summary: of the comparison; see `tailwise.compare.summary.summarize`.
    """

    folder: Path
    groups: Mapping[str, DemoGroup]
    summary: Mapping[str, Any]


def run(
    folder: Path,
    images: int,
    commands_of: Callable[[CompareRecipe], DemoCommands],
    tell: Callable[[str], None],
    track: Track,
    settings: Sequence[str] = (),
    tested: int = TESTED,
) -> DemoResult:
    """Draws the pool in `folder`, prepares it, and compares a plan with random samples; what is there already isn't done again.

    Args:
        folder: new, or of a demo.
        images: of the pool, before near-duplicates.
        commands_of: how commands run on a recipe's catalog.
        tell: takes lines for the user.
        track: shows progress.
        settings: changes of the comparison's recipe, KEY=VALUE.
        tested: images of each concept in the test set.

    Raises:
        UserError: `folder` holds something else, or a demo of another size; open_clip isn't installed.
    """
    if importlib.util.find_spec("open_clip") is None:
        raise UserError(f"the demo trains, which needs open_clip: {INSTALL}")
    check_output_folder(folder, "FOLDER")
    _make_pool(folder, images, tested)
    copies = images // COPIED
    counts = concept_counts(images, CONCEPTS)
    tell(
        f"{folder}/pool: {images + copies:,} drawings of {CONCEPTS} concepts with captions, from {counts[0]:,} to {counts[-1]} of each, "
        f"{copies:,} of them near-duplicates"
    )
    recipe = load_compare_recipe(str(folder / "demo.yaml"), settings)
    commands = commands_of(recipe)
    for step in recipe.prepare:
        tell(f"$ {commands.line(step)}")
        commands.quiet.run(step)
        if step.command in _FOUND:
            tell(f"  {_FOUND[step.command](Catalog.open(recipe.catalog), folder, step)}")
    study = Study(replace(recipe, prepare=()), folder / "comparison")
    plans = {}
    for planned in study.runs(seeds=recipe.seeds[:1]):
        tell(f"$ {commands.line(planned.plan)}")
        commands.quiet.run(planned.plan)
        plans[planned.row.name] = Plan(Catalog.open(recipe.catalog), str(planned.plan.options["name"]))
    groups = _groups(folder, counts, plans)
    tell(f"$ tailwise compare {folder / 'demo.yaml'} --output {study.output}")
    with _one_thread():
        summary = compare(study.recipe, study.output, commands.quiet, tell=lambda text: tell(f"  {text}"), track=track)
    return DemoResult(folder, groups, summary)


def _make_pool(folder: Path, images: int, tested: int) -> None:
    done = folder / "pool.json"
    made = read_json(done) if done.exists() else None
    if made is not None:
        if "test" not in made:
            raise UserError(f"{folder} holds the demo of an older version: name another folder, or delete it")
        if made["images"] != images:
            raise UserError(
                f"{folder} holds a demo of {made['images']:,} images, not {images:,}: name another folder, or delete it"
            )
        return
    own = {"pool", "test", "model", "counts.tsv", "demo.yaml"}
    if folder.exists() and any(path.name not in own for path in folder.iterdir()):
        raise UserError(f"{folder} exists and is no demo: name a new folder")
    make_pool(folder / "pool", images=images, concepts=CONCEPTS, size_px=SIDE_PX, duplicates=images // COPIED)
    make_test_set(folder / "test", concepts=CONCEPTS, each=tested, size_px=SIDE_PX)
    lines = [f"{concept}\t{count}" for concept, count in enumerate(concept_counts(images, CONCEPTS))]
    (folder / "counts.tsv").write_text("\n".join(["class_index\ttrain_count", *lines, ""]), encoding="utf-8")
    shutil.copytree(FILES, folder, dirs_exist_ok=True)
    write_json(done, {"images": images, "test": True})


def _table(path: Path) -> dict[str, list[str]]:
    """A file of tab-separated values, without its header: the first value of each line, and the others."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return {first: others for first, *others in lines}


def _keys(catalog: Catalog) -> list[str]:
    return [key for part in catalog.parts() for key in catalog.samples(part, ["key"]).column(0).to_pylist()]


def _about_dedup(catalog: Catalog, folder: Path, step: Step) -> str:
    """What was dropped, held against the truth: a drawing and its copies are a family, of which one should stay."""
    source = {key: original for key, (original,) in _table(folder / "pool" / "duplicates.tsv").items()}
    dropped = DropList(catalog, str(step.options.get("name", "duplicates"))).mask
    family = [source.get(key, key) for key in _keys(catalog)]
    kept = {name for name, gone in zip(family, dropped, strict=True) if not gone}
    lost = len(set(family)) - len(kept)
    return (
        f"{int(dropped.sum()):,} dropped: {int(dropped.sum()) - lost:,} of the {len(source):,} near-duplicates, and {lost:,} drawings that "
        "have no other copy left"
    )


def _about_clusters(catalog: Catalog, _: Path, step: Step) -> str:
    manifest = read_json(catalog.folder / "clusters" / str(step.options.get("name", "main")) / MANIFEST)
    return f"{manifest['summary']['clusters']:,} clusters of {manifest['summary']['samples']:,} samples"


_FOUND: Mapping[str, Callable[[Catalog, Path, Step], str]] = {"cluster": _about_clusters, "dedup": _about_dedup}


def _groups(folder: Path, counts: Sequence[int], plans: Mapping[str, Plan]) -> dict[str, DemoGroup]:
    """Who is in the pool and in epoch 0, by the thirds of the concepts that the evaluation goes by."""
    catalog = next(iter(plans.values())).catalog
    concept_of = {key: int(values[0]) for key, values in _table(folder / "pool" / "concepts.tsv").items()}
    concepts = np.array([concept_of[key] for key in _keys(catalog)])
    drawn = {name: plan.draw(0).astype(np.int64) for name, plan in plans.items()}
    groups = {}
    for name, members in thirds(np.array(counts)).items():
        inside = np.isin(concepts, members)
        shares = {row: float(copies[inside].sum() / copies.sum()) for row, copies in drawn.items()}
        groups[name] = DemoGroup(len(members), float(inside.mean()), shares)
    return groups


@contextmanager
def _one_thread() -> Iterator[None]:
    """The model is so small that threads would wait for each other; and figures don't depend on how many processors there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
