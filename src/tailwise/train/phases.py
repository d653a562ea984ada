"""The phases of a training, decided from options, recipe and arguments before anything runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tailwise.catalog.files import digest
from tailwise.catalog.outputs import check_output_folder
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.loader.captions import CaptionMix
from tailwise.loader.order import Order, OrderOptions, choose_lanes
from tailwise.loader.pool import ON_DAMAGED
from tailwise.plan.plan import MAX_EPOCH, Plan
from tailwise.recipes import Phase, Recipe
from tailwise.requests import TrainRequest, bytes_of, caption_weights
from tailwise.shards.verify import CHECKS
from tailwise.text import option_words
from tailwise.train.arguments import LOCAL_MODEL, check_model, deciding, parse, refuse_owned, require_model
from tailwise.train.guard import Trainer
from tailwise.train.runs import read_run
from tailwise.train.segments import Segments, cut

Report = Callable[[str], None]  # takes a line for people
PROGRESS_STEPS = 100
REPLACED = "replaced-rank-"  # start of the names of logs of replaced samples, one log per rank
WEIGHTS = "open_clip_pytorch_model.bin"  # the name that open_clip expects in a folder
MAX_SEED = 2**31 - 1  # the trainer adds the rank, and numpy takes 32 bits


@dataclass(frozen=True)
class Run:
    """One phase, decided."""

    number: int  # 0, 1, …
    folder: Path  # LOGS/NAME
    arguments: list[str]  # open_clip's arguments as given
    parsed: argparse.Namespace  # the same, parsed by open_clip
    order: OrderOptions  # order of the samples over all ranks, with accumulation and first epoch
    rank: int  # rank of this process
    ranks: int  # number of ranks
    last_epoch: int  # plan epoch in which the phase ends
    segments: Segments  # segments of the phase
    start: Run | None  # the phase whose weights this one starts from, if any
    found: Mapping[str, Any] | None  # content of the folder's `tailwise.json`; None if there is none
    decides: Mapping[str, Any]  # values that must be the same when the phase is resumed

    @property
    def batches(self) -> int:
        """Batches of the whole phase."""
        return self.segments.batches

    @property
    def epochs(self) -> str:
        """Epochs of the plan, in words."""
        first, last = self.order.first_epoch, self.last_epoch
        return f"epochs {first} to {last}" if last > first else f"epoch {first}"

    @property
    def final(self) -> Path:
        """Folder of the weights that the next phase starts from."""
        return self.folder / "final"


def decide(
    plan: Plan,
    argv: Sequence[str],
    options: TrainRequest,
    recipe: Recipe | None,
    trainer: Trainer,
    context: Context,
    *,
    keep: bool = True,
) -> list[Run]:
    """Return all phases of a training, or raise a UserError for invalid options, or a plan that is too small for a single step.

    `keep`: write the sizes of epochs of a random draw, once counted, into the plan's folder. Nothing else is written.
    """
    _check(options)
    for option, folder in (("`record`", options.record), ("`cache`", options.cache)):
        if folder is not None:
            check_output_folder(folder, option)
    refuse_owned(argv)
    parse(argv, trainer.parse_args)  # open_clip's help and its errors about the user's arguments come first
    runs: list[Run] = []
    phases = _phases(options, recipe)
    for number, phase in enumerate(phases):
        refuse_owned(option_words(phase.open_clip))
        arguments = _arguments(argv, phase, trainer)
        parsed = parse(arguments, trainer.parse_args)
        require_model(arguments)
        check_model(parsed, trainer.open_clip)
        if len(phases) > 1 and parsed.dist_url not in {None, "env://"}:
            needed = "a recipe of several phases needs env://, which torchrun sets up"
            raise UserError(f"`dist_url` {parsed.dist_url}: {needed}")
        name = parsed.name or (f"{plan.name}-{recipe.name}" if recipe else plan.name)
        folder = Path(parsed.logs) / (name if len(phases) == 1 else f"{name}-phase{number + 1}")
        check_output_folder(folder, "`logs`")
        start = runs[-1] if runs else None
        runs.append(_decide_one(plan, number, folder, arguments, parsed, phase, options, trainer, start, context, keep))
    return runs


def _check(request: TrainRequest) -> None:
    """Refuse invalid options before a run's folder is created."""
    for name, value, choices in (("check", request.check, CHECKS), ("damaged", request.damaged, ON_DAMAGED)):
        if value not in choices:
            raise UserError(f"`{name}` {value!r}: must be one of {', '.join(choices)}")
    if not 0 <= request.max_replaced <= 1:
        raise UserError(f"`max_replaced` {request.max_replaced}: must lie between 0 and 1")
    if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
        raise UserError(f"`seed` {request.seed}: must lie between 0 and {MAX_SEED:,}")
    bytes_of("cache_size", request.cache_size)


def _phases(options: TrainRequest, recipe: Recipe | None) -> list[Phase]:
    """Return the recipe's phases, or the only phase; options override the recipe."""
    if options.epochs is not None and options.lengths:
        raise UserError("give either `epochs` or `samples_seen`")
    if recipe is None and options.epochs is None and not options.lengths:
        raise UserError("say how long: give `epochs` (of the plan), `samples_seen` or a `recipe`")
    phases = recipe.phases if recipe is not None else (Phase(),)
    if options.epochs is not None and len(phases) > 1:
        raise UserError(f"`epochs` {options.epochs}: the recipe has {len(phases)} phases: give `samples_seen` instead")
    own = {name: getattr(options, name) for name in ("checkpoint_every", "lanes", "block", "compose")}
    given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    if options.captions is not None:
        given["captions"] = caption_weights(options.captions)
    if options.epochs is not None:
        given |= {"epochs": options.epochs, "samples_seen": None}
    lengths: list[dict[str, Any]] = [
        {"epochs": None, "samples_seen": samples} for samples in _shared(options.lengths, phases)
    ]
    return [
        replace(phase, **given, **length) for phase, length in zip(phases, lengths or [{}] * len(phases), strict=True)
    ]


def _shared(lengths: Sequence[int], phases: Sequence[Phase]) -> list[int]:
    """Return the samples of each phase: as given, or shares of a total in the proportions of the phases, which sum to it exactly."""
    if len(lengths) in {0, len(phases)}:
        return list(lengths)
    unit = "epochs" if phases[0].samples_seen is None else "samples_seen"
    weights = [getattr(phase, unit) or 0 for phase in phases]
    given = ",".join(map(str, lengths))
    if len(lengths) > 1:
        raise UserError(
            f"`samples_seen` {given}: {len(lengths)} numbers for {len(phases)} phase{'s' * (len(phases) > 1)}: "
            "give one number for all of the training, or one for each phase"
        )
    if 0 in weights:
        raise UserError(
            f"`samples_seen` {given}: some of the recipe's {len(phases)} phases are given in epochs, some in samples: "
            "give one number for each phase, with commas"
        )
    bounds = [lengths[0] * sum(weights[:number]) // sum(weights) for number in range(len(phases) + 1)]
    return [stop - start for start, stop in pairwise(bounds)]


def _arguments(argv: Sequence[str], phase: Phase, trainer: Trainer) -> list[str]:
    """Return defaults, then the recipe's arguments, then the user's: open_clip takes the last of duplicates."""
    own = option_words({"save-frequency": 0, **phase.open_clip})
    if phase.global_batch is not None:
        accumulation = parse([*own, *argv], trainer.parse_args).accum_freq
        share, rest = divmod(phase.global_batch, trainer.ranks()[1] * accumulation)
        if rest:
            raise UserError(
                f"the recipe's step of {phase.global_batch:,} samples can't be shared by {trainer.ranks()[1]} ranks × "
                f"{accumulation} batches: take another number of ranks or `accum_freq`, or give `batch_size` after the --"
            )
        own += option_words({"batch-size": share})
    return [*own, *argv]


def _decide_one(
    plan: Plan,
    number: int,
    folder: Path,
    arguments: list[str],
    parsed: argparse.Namespace,
    phase: Phase,
    options: TrainRequest,
    trainer: Trainer,
    start: Run | None,
    context: Context,
    keep: bool,
) -> Run:
    if start is not None and ":" in start.parsed.model and not start.parsed.model.startswith(LOCAL_MODEL):
        needed = f"a recipe of several phases needs a model by name, or {LOCAL_MODEL}FOLDER"
        raise UserError(f"`model` {start.parsed.model}: {needed}")
    rank, ranks = trainer.ranks()
    global_batch, accumulation = parsed.batch_size * ranks, parsed.accum_freq
    found = read_run(folder) if options.resume else None
    before = found["decides"] if found and found["decides"]["global batch"] == global_batch else {}
    lanes = phase.lanes or before.get("lanes") or choose_lanes(global_batch, ranks)
    block = phase.block or before.get("block") or OrderOptions.block
    seed = int(plan.config.get("seed", 0)) if options.seed is None else options.seed
    compose = phase.compose or "shuffle"
    first = 0 if start is None else start.last_epoch + 1
    captions = caption_weights(phase.captions)
    order = OrderOptions(global_batch, accumulation, seed, lanes, block, compose, first, captions)
    order.check_ranks(ranks)
    counting = Order(plan, order, keep=keep)
    batches = _batches(counting, phase, first, context)
    if batches < accumulation and phase.epochs is None:
        few = f"{phase.samples_seen:,} samples are less than a step of {global_batch * accumulation:,}"
        raise UserError(f"{few}: give more `samples_seen`, or a smaller `batch_size` after the --")
    if batches < accumulation:
        few = f"plan {plan.name!r} gives {batches} batches of {global_batch:,} samples, less than a step of {accumulation}"
        raise UserError(f"{few}: give more epochs, or a smaller `batch_size` after the --")
    if phase.checkpoint_every is not None and phase.checkpoint_every < accumulation:
        raise UserError(f"`checkpoint_every` {phase.checkpoint_every}: must be at least `accum_freq` {accumulation}")
    segments = cut(batches, accumulation, phase.checkpoint_every)
    decides = {
        "plan": f"{plan.name} {digest(plan.manifest['identity'])}",
        "seed": seed,
        "lanes": lanes,
        "block": block,
        "compose": compose,
        **({"concepts": counting.concept_ids} if counting.concept_ids else {}),
        "global batch": global_batch,
        "accumulation": accumulation,
        "first epoch": first,
        **({"captions": dict(captions), "joined": CaptionMix(plan.catalog, captions, seed).ids} if captions else {}),
        "segments": segments.count,
        "batches of a segment": segments.length,
        **({} if segments.last == segments.length else {"batches of the last segment": segments.last}),
        "open_clip": trainer.version,
        **deciding(parsed),
    }
    last = counting.epoch_at(segments.batches - 1) if phase.epochs is None else first + phase.epochs - 1
    return Run(number, folder, arguments, parsed, order, rank, ranks, last, segments, start, found, decides)


def _check_epochs(counting: Order, phase: Phase, first: int) -> None:
    """Refuse a phase that needs more epochs than a plan has, by the size of its first epoch."""
    each = max(counting.drawn(min(first, MAX_EPOCH)), 1)
    samples = (phase.samples_seen or 0) // counting.options.batch_size * counting.taken
    needed = first + (phase.epochs or -(-samples // each))
    if needed > MAX_EPOCH + 1:
        option = "`epochs`" if phase.epochs is not None else "`samples_seen`"
        raise UserError(
            f"the training needs about {needed:,} epochs of plan {counting.plan.name!r}, which draws {each:,} samples an epoch; "
            f"a plan has {MAX_EPOCH + 1:,} epochs: give fewer {option}, or a plan that draws more samples"
        )


def _batches(counting: Order, phase: Phase, first: int, context: Context) -> int:
    """Return the number of batches of a phase. For a random draw, all its epochs are counted, which takes time once."""
    _check_epochs(counting, phase, first)
    if phase.epochs is not None:
        steps = range(first + 1, first + phase.epochs, -(-phase.epochs // PROGRESS_STEPS))
        for epoch in context.progress(steps, "counting epochs", len(steps)):
            counting.batches_until(epoch)
        return counting.batches_until(first + phase.epochs)
    batches = (phase.samples_seen or 0) // counting.options.batch_size
    steps = range(0, batches, max(1, batches // PROGRESS_STEPS))
    for batch in context.progress(steps, "counting epochs", len(steps)):
        counting.epoch_at(batch)
    return batches
