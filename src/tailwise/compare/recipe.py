"""What is compared, as a YAML file: rows, seeds, one training for all, and what it is measured by."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tailwise.devices import ALLOWED, DEVICE_NAME
from tailwise.errors import UserError
from tailwise.loader.order import COMPOSITIONS
from tailwise.recipes.pipeline import Step, steps_of, texts_of
from tailwise.recipes.recipe import as_mapping, check_values, with_folder
from tailwise.recipes.yaml_file import parse_yaml, read_yaml
from tailwise.rejects import MAX_REJECTED, check_share

FOLDER = Path(__file__).parents[1] / "recipes" / "compare"
PRECISIONS = ("fp32", "bf16")
EVALUATE = (
    *("data", "classes", "templates", "train_counts", "pool", "groups"),
    *("batch_size", "workers", "device", "precision", "bootstrap", "seed", "max_rejected"),
)
ROW_NAME = re.compile(r"[^/\\\x00-\x1f]{1,100}")


@dataclass(frozen=True)
class Training:
    """The training that all rows share.

    Attributes:
        trainer: a name of TRAINERS: "in-process", or "open_clip".
        model: local-dir:FOLDER, or a name that open_clip knows.
        samples_seen: of each run, whatever its plan.
        global_batch: samples of an optimizer step.
        lr: peak of the learning rate.
        warmup: steps.
        wd: weight decay, of all but gains, biases and the logit scale.
        beta1: of AdamW.
        beta2: likewise.
        eps: likewise.
        precision: "fp32" or "bf16" (autocast).
        augment: {"scale": [least, most]}: area of the random resized crop, as a share of the image's; None for no augmentation.
        cache_pixels: in-process: side of the cached images; None for the model's own, and a quarter more where images are cropped.
        device: a name for `find_device`.
        workers: open_clip: processes that decode.
        open_clip: open_clip: further arguments of its trainer, without the dashes.
        max_rejected: in-process: share of the pool's samples that may be unreadable; others are taken in their place.
    """

    model: str
    samples_seen: int
    trainer: str = "in-process"
    global_batch: int = 256
    lr: float = 1e-3
    warmup: int = 100
    wd: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    precision: str = "fp32"
    augment: Mapping[str, Sequence[float]] | None = None
    cache_pixels: int | None = None
    device: str = "auto"
    workers: int = 1
    open_clip: Mapping[str, Any] = field(default_factory=dict)
    max_rejected: float = MAX_REJECTED


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: as the table shows it.
        plan: options of `tailwise plan`, without the dashes.
        compose: of the loader's order.
    """

    name: str
    plan: Mapping[str, Any]
    compose: str = "shuffle"

    @property
    def slug(self) -> str:
        """The name, fit for a folder."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.") or "row"


@dataclass(frozen=True)
class CompareRecipe:
    """A comparison.

    Attributes:
        name: short.
        about: what it asks.
        catalog: whose samples are trained on.
        evaluate: `data`, and options of `tailwise evaluate`.
        train: what all rows share.
        seeds: of weights, order, augmentation and draw.
        baseline: the row that the others are held against.
        rows: in the order of the table.
        sources: what `prepare` imports.
        prepare: commands that make the catalog, its clusterings and drop lists.
        needs: command that makes the catalog, if `prepare` does not.
    """

    name: str
    about: str
    catalog: str
    evaluate: Mapping[str, Any]
    train: Training
    seeds: tuple[int, ...]
    baseline: str
    rows: tuple[Row, ...]
    sources: tuple[str, ...] = ()
    prepare: tuple[Step, ...] = ()
    needs: str = ""

    def row(self, name: str) -> Row:
        """The row of a name.

        Raises:
            UserError: there is none; names those there are.
        """
        for row in self.rows:
            if name in {row.name, row.slug}:
                return row
        raise UserError(f"no row {name!r}: the recipe has {', '.join(row.name for row in self.rows)}")


def load_compare_recipe(name: str, settings: Sequence[str] = ()) -> CompareRecipe:
    """Reads a recipe.

    Args:
        name: of a comparison that comes with the package, or the path of a .yaml file.
        settings: changes of it, as KEY=VALUE, KEY with dots for what lies deeper and VALUE in YAML: "train.samples_seen=20000".

    Raises:
        UserError: there is none of this name, or it isn't as it must be.
    """
    path, content = read_yaml(name, FOLDER)
    where = f"recipe {path}"
    values = as_mapping(where, content, [item.name for item in fields(CompareRecipe)])
    for setting in settings:
        values = _with_setting(values, setting)
    values = as_mapping(where, with_folder(values, path.parent), [item.name for item in fields(CompareRecipe)])
    return _recipe(where, values)


def _with_setting(values: Mapping[str, Any], setting: str) -> dict[str, Any]:
    key, sign, text = setting.partition("=")
    if not sign or not key:
        raise UserError(f"`set` {setting!r}: give KEY=VALUE, such as train.samples_seen=20000")
    value = parse_yaml(text, f"`set` {setting!r}")
    changed = copy.deepcopy(dict(values))
    place, left = changed, key
    while known := [name for name in place if left.startswith(f"{name}.")]:  # names of rows may have dots themselves
        name = max(known, key=len)
        place[name] = place[name] or {}
        if not isinstance(place[name], dict):
            raise UserError(f"`set` {setting!r}: {name} is {place[name]!r}, which holds nothing")
        place, left = place[name], left[len(name) + 1 :]
    place[left] = value
    return changed


def _recipe(where: str, values: dict[str, Any]) -> CompareRecipe:
    texts, remedy = ("name", "about", "catalog", "baseline"), "add it, or give it with `set` {name}=…"
    check_values(where, values, texts, ("evaluate", "train", "seeds", "rows"), remedy)
    evaluate = as_mapping(f"{where}, evaluate", values["evaluate"], EVALUATE)
    if evaluate.get("data") is None:
        raise UserError(f"{where}, evaluate lacks 'data': add it, or give it with `set` evaluate.data=FOLDER")
    seeds = values["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(_is_whole(seed, 0) for seed in seeds):
        raise UserError(
            f"{where}: seeds is {seeds!r}: must be a list of whole numbers of at least 0, such as [0, 1, 2]"
        )
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: seeds is {seeds!r}: each may be there once")
    if not isinstance(values["rows"], Mapping) or not values["rows"]:
        raise UserError(f"{where}: rows is {values['rows']!r}: must be names and options of `tailwise plan`")
    rows = tuple(_row(f"{where}, row {name!r}", name, content) for name, content in values["rows"].items())
    if len({row.slug for row in rows}) < len(rows):
        raise UserError(f"{where}: two rows have names that differ in case or signs only: rename one")
    recipe = CompareRecipe(
        name=values["name"],
        about=values["about"],
        catalog=values["catalog"],
        evaluate=evaluate,
        train=_training(f"{where}, train", values["train"]),
        seeds=tuple(seeds),
        baseline=values["baseline"],
        rows=rows,
        sources=texts_of(f"{where}: sources", values.get("sources") or []),
        prepare=steps_of(f"{where}: prepare", values.get("prepare") or []),
        needs=str(values.get("needs") or ""),
    )
    recipe.row(recipe.baseline)
    return recipe


def _row(where: str, name: object, content: object) -> Row:
    if not isinstance(name, str) or not ROW_NAME.fullmatch(name):
        raise UserError(f"{where}: a name must be text of 1 to 100 characters, without slashes")
    if not isinstance(content, Mapping):
        raise UserError(
            f"{where} is {content!r}: must be options of `tailwise plan` and values, such as {{method: random}}"
        )
    options = {str(option).replace("_", "-"): value for option, value in content.items()}
    compose = options.pop("compose", "shuffle")
    if compose not in COMPOSITIONS:
        raise UserError(f"{where}: compose is {compose!r}: must be one of {', '.join(COMPOSITIONS)}")
    for owned in ("seed", "name", "catalog"):
        if owned in options:
            raise UserError(f"{where} has {owned!r}, which the comparison gives: leave it out")
    return Row(name, options, compose)


def _training(where: str, content: object) -> Training:
    values = as_mapping(where, content, [item.name for item in fields(Training)])
    for name in ("model", "samples_seen"):
        if values.get(name) is None:
            raise UserError(f"{where} lacks {name!r}: add it")
    for name, least in (("samples_seen", 1), ("global_batch", 2), ("warmup", 0), ("workers", 0), ("cache_pixels", 1)):
        if values.get(name) is not None and not _is_whole(values[name], least):
            raise UserError(f"{where}: {name} is {values[name]!r}: must be a whole number of at least {least}")
    for name in ("lr", "wd", "beta1", "beta2", "eps", "max_rejected"):
        if name in values:
            values[name] = _number(f"{where}: {name}", values[name])
    if values.get("precision", PRECISIONS[0]) not in PRECISIONS:
        raise UserError(f"{where}: precision is {values['precision']!r}: must be one of {', '.join(PRECISIONS)}")
    if not DEVICE_NAME.fullmatch(str(values.get("device", "auto"))):
        raise UserError(f"{where}: device is {values['device']!r}: must be {ALLOWED}")
    if values.get("augment") is not None:
        values["augment"] = _augment(f"{where}, augment", values["augment"])
    training = Training(**values)
    check_share(training.max_rejected)
    if training.samples_seen < training.global_batch:
        raise UserError(
            f"{where}: samples_seen {training.samples_seen:,} is less than a batch of {training.global_batch:,}: give more"
        )
    return training


def _augment(where: str, content: object) -> dict[str, list[float]]:
    value = as_mapping(where, content, ("scale",)).get("scale")
    if not isinstance(value, list) or len(value) != 2:
        raise UserError(f"{where}: scale is {value!r}: must be [least, most]")
    least, most = (_number(f"{where}: scale", item) for item in value)
    if not 0 < least <= most <= 1:
        raise UserError(f"{where}: scale is {value!r}: must be [least, most], above 0 and at most 1")
    return {"scale": [least, most]}


def _number(where: str, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]  # YAML takes 1e-3 for text
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} is {value!r}: must be a number") from error


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def choose(
    recipe: CompareRecipe, only: Collection[str] = (), seeds: Collection[int] = ()
) -> tuple[list[Row], list[int]]:
    """The rows and seeds that are run now; all by default.

    Raises:
        UserError: one that the recipe doesn't have.
    """
    rows = {recipe.row(name).name for name in only} or {row.name for row in recipe.rows}
    unknown = sorted(set(seeds) - set(recipe.seeds))
    if unknown:
        raise UserError(
            f"seed {unknown[0]} isn't the recipe's ({', '.join(map(str, recipe.seeds))}): `set` seeds=[…] changes them"
        )
    return [row for row in recipe.rows if row.name in rows], [
        seed for seed in recipe.seeds if not seeds or seed in seeds
    ]
