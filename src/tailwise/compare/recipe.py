"""A comparison as a YAML file: rows, seeds, one training for all rows, and the evaluation."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, InstanceOf

from tailwise.devices import ALLOWED, DEVICE_NAME
from tailwise.errors import MAX_REJECTED, UserError
from tailwise.loader.order import check_composition
from tailwise.pipeline.steps import Steps
from tailwise.recipes.recipe import (
    NAMED,
    Natural,
    Positive,
    Text,
    Texts,
    Values,
    parse_yaml,
    read_as,
    read_yaml,
    with_folder,
)
from tailwise.requests import EvaluateRequest
from tailwise.text import new_spelling

FOLDER = Path(__file__).parents[1] / "recipes" / "compare"
ROW_NAME = r"^[^/\\\x00-\x1f]{1,100}$"


@dataclass(frozen=True)
class Training:
    """The training that all rows share."""

    model: Text  # local-dir:FOLDER, or a name that open_clip knows
    samples_seen: Positive  # samples seen in each run, unless its row has its own number
    trainer: Text = "in-process"  # a name in TRAINERS: "in-process" or "open_clip"
    global_batch: Annotated[int, Field(strict=True, ge=2)] = 256  # samples per optimizer step
    lr: float = 1e-3  # peak learning rate
    warmup: Natural = 100  # warm-up steps
    wd: float = 0.1  # weight decay; not applied to gains, biases and the logit scale
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.98  # of AdamW
    eps: float = 1e-6  # of AdamW
    precision: Literal["fp32", "bf16"] = "fp32"  # "fp32" or "bf16" (autocast)
    # {"scale": [least, most]}: area of the random resized crop, as a share of the image's; None for no augmentation
    augment: Annotated[Mapping[str, Sequence[float]], NAMED] | None = None
    # in-process: bound of the shorter side of cached images, which saves disk, and changes pixels; None: they stay as they are
    cache_pixels: Positive | None = None
    device: Annotated[Text, Field(pattern=f"^({DEVICE_NAME.pattern})$", description=ALLOWED)] = "auto"
    workers: Natural = 1  # number of processes that make batches
    open_clip: Values = field(default_factory=dict)  # open_clip: further arguments of its trainer, without the dashes
    # in-process: largest share of the pool that may be unreadable; unreadable samples are replaced
    max_rejected: Annotated[float, Field(ge=0, le=1)] = MAX_REJECTED


def _composition(text: str) -> str:
    try:
        check_composition(text)
    except UserError as error:
        raise ValueError(str(error)) from error
    return text


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: Annotated[Text, Field(pattern=ROW_NAME, description="text of 1 to 100 characters, without slashes")]
    plan: Values  # options of `tailwise plan`, without the dashes
    compose: Annotated[Text, AfterValidator(_composition)] = "shuffle"  # how the loader's order composes batches
    samples_seen: Positive | None = None  # in place of the training's

    @property
    def slug(self) -> str:
        """The name as a folder name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.") or "row"


@dataclass(frozen=True)
class Truth:
    """A table of classes, for figures about the rows; no method and no training reads it."""

    file: Text  # .tsv, .csv, .jsonl or Parquet, with `key` or `uid`
    column: Text = "class_index"  # column of the classes
    by: Text | None = None  # column of the groups whose rates are shown, in place of thirds of the classes


@dataclass(frozen=True)
class CompareRecipe:
    """A comparison."""

    name: Text  # short name
    about: Text  # the question that the comparison answers
    catalog: Text  # folder of the catalog
    evaluate: Values  # `data`, and options of `tailwise evaluate`
    train: Training  # the training that all rows share
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1, description="a list of whole numbers, such as [0, 1, 2]")]
    baseline: Text  # name of the row that the others are compared with
    rows: Annotated[tuple[InstanceOf[Row], ...], Field(min_length=1, description="options of `tailwise plan` by name")]
    sources: Texts = ()  # sources that `prepare` imports
    # commands that make the catalog, its clusterings and drop lists
    prepare: Annotated[Steps, BeforeValidator(lambda given: given or ())] = ()
    needs: Text = ""  # command that makes the catalog, if `prepare` does not
    truth: Annotated[
        Truth | None, BeforeValidator(lambda given: {"file": given} if isinstance(given, str) else given)
    ] = None

    def evaluation(self, where: str) -> EvaluateRequest:
        """Return what the evaluation of a run is asked for; a UserError names `where`."""
        given = {name: value for name, value in self.evaluate.items() if name != "data" and value is not None}
        return read_as(EvaluateRequest, {"model": self.train.model, **given}, f"{where}, evaluate")

    def training(self, row: Row) -> Training:
        """Return the training of a row."""
        return self.train if row.samples_seen is None else replace(self.train, samples_seen=row.samples_seen)

    def row(self, name: str) -> Row:
        """Return the row of a name or slug, or raise a UserError that lists the rows."""
        for row in self.rows:
            if name in {row.name, row.slug}:
                return row
        raise UserError(f"no row {name!r}: the recipe has {', '.join(row.name for row in self.rows)}")


def load_compare_recipe(name: str, settings: Sequence[str] = ()) -> CompareRecipe:
    """Return a valid recipe: the `name` of a comparison that comes with tailwise, or the path of a .yaml file.

    `settings` are changes as KEY=VALUE, with dots in KEY for nested keys and VALUE in YAML: "train.samples_seen=20000".
    """
    path, content = read_yaml(name, FOLDER)
    where = f"recipe {path}"
    for setting in settings if isinstance(content, Mapping) else ():
        content = _with_setting(content, setting)
    content = with_folder(content, path.parent)
    if isinstance(content, dict) and isinstance(content.get("rows"), dict):
        content["rows"] = [_row(f"{where}, row {name!r}", name, options) for name, options in content["rows"].items()]
    recipe = read_as(CompareRecipe, content, where, "add it, or give it with `set` KEY=…")
    _check(where, recipe)
    return recipe


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
            raise UserError(
                f"`set` {setting!r}: {name} is {place[name]!r}, which holds nothing: give a key of a mapping"
            )
        place, left = place[name], left[len(name) + 1 :]
    place[left] = value
    return changed


def _row(where: str, name: object, content: object) -> Row:
    options = _plan_options(where, content)
    own = {
        key: options.pop(given)
        for key, given in (("compose", "compose"), ("samples_seen", "samples-seen"))
        if given in options
    }
    return read_as(Row, {**own, "name": name, "plan": options}, where)


def _plan_options(where: str, content: object) -> dict[str, Any]:
    """Return options of `tailwise plan` by their present names; `of` may hold those of another plan."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where} is {content!r}: must be options of `tailwise plan`, such as {{method: random}}")
    options = {new_spelling("plan", str(option).replace("_", "-")): value for option, value in content.items()}
    for owned in ("seed", "name", "catalog"):
        if owned in options:
            raise UserError(f"{where} has {owned!r}, which the comparison gives: leave it out")
    if isinstance(options.get("of"), Mapping):
        options["of"] = _plan_options(f"{where}, of", options["of"])
    return options


def _check(where: str, recipe: CompareRecipe) -> None:
    train = recipe.train
    recipe.evaluation(where)
    if recipe.evaluate.get("data") is None:
        raise UserError(f"{where}, evaluate lacks 'data': add it, or give it with `set` evaluate.data=FOLDER")
    scale = (train.augment or {}).get("scale", [])
    if train.augment is not None and (len(train.augment) != 1 or len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1):
        allowed = "{scale: [least, most]}, above 0, at most 1"
        raise UserError(f"{where}, train: augment is {train.augment}: must be {allowed}")
    for place, seen in (
        ("train", train.samples_seen),
        *((f"row {row.name!r}", row.samples_seen) for row in recipe.rows),
    ):
        if seen is not None and seen < train.global_batch:
            raise UserError(
                f"{where}, {place}: samples_seen {seen:,} is less than a batch of {train.global_batch:,}: give more"
            )
    if len(set(recipe.seeds)) < len(recipe.seeds):
        raise UserError(f"{where}: seeds is {[*recipe.seeds]}: each may be there once; remove the duplicates")
    if len({row.slug for row in recipe.rows}) < len(recipe.rows):
        raise UserError(f"{where}: two rows have names that differ in case or signs only: rename one")
    recipe.row(recipe.baseline)


def choose(
    recipe: CompareRecipe, only: Collection[str] = (), seeds: Collection[int] = ()
) -> tuple[list[Row], list[int]]:
    """Return the chosen rows and seeds (all by default); raise a UserError for one that the recipe does not have."""
    names = {recipe.row(name).name for name in only}
    if unknown := sorted(set(seeds) - set(recipe.seeds)):
        known = ", ".join(map(str, recipe.seeds))
        raise UserError(f"seed {unknown[0]} isn't the recipe's ({known}): change them with `set` seeds=[…]")
    rows = [row for row in recipe.rows if not names or row.name in names]
    return rows, [seed for seed in recipe.seeds if not seeds or seed in seeds]
