"""The endless order of samples: the rows of each global batch. A function of the plan and of Order's options alone.

Sections (one an epoch, in lanes and blocks) give the base order; `spread` rearranges a section; equal rows are kept apart; `diverse`
picks from super-batches. Any batch can be computed at any time, at bounded cost: the order is computed in *spans* of some batches.
To keep rows apart, a span needs its neighbours; so even spans are settled alone, and odd ones between their settled neighbours.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.artifacts import artifact_id
from tailwise.catalog.concepts import Concepts
from tailwise.catalog.files import digest
from tailwise.errors import UserError
from tailwise.kernels.compose import deal, pick_covering, pick_diverse, pick_richest
from tailwise.kernels.keyed import stream_key
from tailwise.kernels.spacing import space_out
from tailwise.loader.captions import CaptionMix
from tailwise.loader.sections import SIZE, Samples, Section, Sections, units_of
from tailwise.plan.plan import Plan
from tailwise.requests import at_least
from tailwise.storage.lru import LRUCache

PICKS = {"diverse": pick_covering, "most-concepts": pick_richest}  # from super-batches; by lists of concepts
COMPOSITIONS = ("shuffle", "spread", *PICKS)
SPAN_SAMPLES = 1 << 17
GREATEST_SPAN_SAMPLES = 1 << 20  # if rows repeat so often that they crowd, or clusters are spread over an epoch
ROOM = 4  # rows crowd if their copies would be closer than this number of windows
LEAST_SPAN_WINDOWS = 8
KEPT_SPANS = 4
KEPT_CHUNKS = 2
SUPER_BATCH = 5  # CABS: keep a fifth
Block = tuple[int, int]  # number of the section, and of the block in its lanes
MOST_LANES = 64
FORMAT = 1  # raised when the same options would give another order


@dataclass(frozen=True)
class OrderOptions:
    """Everything that decides the order, besides the plan. No row comes twice in an optimizer step, if that is possible.

    Compositions: "shuffle"; "spread": no batch holds more of a cluster than its share, rounded up; "diverse": each batch is the fifth of a
    super-batch that covers its clusters best (CABS-DM, arXiv 2511.20643); the rest of the super-batch is not trained on. "diverse:NAME":
    the same over lists of concepts, in place of clusters; "most-concepts:NAME": the fifth with the longest lists (CABS-FM).
    """

    batch_size: int  # G, samples of a global batch
    accumulation: int = 1  # batches per optimizer step
    seed: int = 0  # of the order; the plan has its own, for the draw
    lanes: int = 64  # C; divides the batch, and is divided by the number of ranks
    block: int = 8192  # about the number of samples of a lane that are shuffled together
    compose: str = "shuffle"
    first_epoch: int = 0  # the plan's epoch that the order starts with
    # share of each, see `caption_weights`; empty: samples' own
    captions: Mapping[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Raise a UserError if an option is out of bounds."""
        at_least(self, batch_size=1, accumulation=1, lanes=1, block=1, first_epoch=0)
        self.check_ranks(1)
        check_composition(self.compose)

    @property
    def composition(self) -> str:
        """One of COMPOSITIONS."""
        return self.compose.partition(":")[0]

    @property
    def concepts(self) -> str | None:
        """Name of the lists of concepts that batches are picked by; None for clusters."""
        return self.compose.partition(":")[2] or None

    def check_ranks(self, world_size: int) -> None:
        """Raise a UserError if the lanes do not divide the global batch, or cannot be shared by the ranks."""
        if self.batch_size % self.lanes or self.lanes % world_size:
            fitting = choose_lanes(self.batch_size, world_size)
            ranks = f", and be a multiple of the {world_size} ranks" if world_size > 1 else ""
            raise UserError(
                f"{self.lanes} lanes: must divide the global batch of {self.batch_size:,} samples{ranks}; "
                f"leave lanes out, or give {fitting}"
            )


def check_composition(compose: str) -> None:
    """Raise a UserError unless a text is one of COMPOSITIONS, with the name of lists of concepts where it needs or takes them."""
    name, colon, concepts = compose.partition(":")
    if name not in COMPOSITIONS:
        raise UserError(f"composition {compose!r}: must be one of {', '.join(COMPOSITIONS)}")
    if colon and name not in PICKS:
        raise UserError(f"composition {compose!r}: {name} takes no concepts; leave out {colon + concepts!r}")
    if not concepts and (colon or name == "most-concepts"):
        raise UserError(f"composition {compose!r}: name the concepts, such as {name}:tags (`tailwise concepts`)")


def choose_lanes(global_batch: int, ranks: int) -> int:
    """Return the number of lanes where none is given: a divisor of the global batch and a multiple of the ranks.

    At most 64, unless there are more ranks. Of the numbers that fit, the result shares the largest power of two with 64, so that
    other numbers of ranks fit as well.
    """
    share = global_batch // ranks
    fitting = [ranks * part for part in range(1, MOST_LANES // ranks + 1) if share % part == 0]
    return max(fitting, key=lambda lanes: (lanes & -lanes, lanes), default=ranks)


class Order:
    """The endless order of a plan's samples, in global batches. A UserError if the plan has no clusters to compose by.

    `keep`: write the sizes of epochs of a random draw, once counted, into the plan's folder.
    """

    def __init__(self, plan: Plan, options: OrderOptions, *, keep: bool = True) -> None:
        options.check()
        if options.composition != "shuffle" and options.concepts is None and not plan.has_clusters:
            raise UserError(
                f"plan {plan.name!r} carries rates, not clusters: it can't be composed by {options.compose!r}"
            )
        self._concepts = None if options.concepts is None else Concepts(plan.catalog, options.concepts)
        if self._concepts is not None:
            self._concepts.check_covers(plan.snapshot)
        self.plan, self.options, self._keep = plan, options, keep
        self.sections = Sections(plan, options.seed, options.lanes, options.block, options.first_epoch)
        self._totals: dict[int, int] = {}
        self._bounds = [0]  # of spans, in batches
        self._next_section = 0
        self._spans: LRUCache[tuple[int, int, int], Samples] = LRUCache(KEPT_SPANS)
        self._chunks: LRUCache[tuple[int, int], Samples] = LRUCache(KEPT_CHUNKS)

    @cached_property
    def identity(self) -> str:
        """Hash of everything that decides the order and its captions: equal if and only if both are."""
        options, captions = asdict(self.options), self.options.captions
        del options["captions"]
        mixed = [dict(captions), CaptionMix(self.plan.catalog, captions, 0).ids]
        return digest([FORMAT, artifact_id(self.plan.manifest), options, *mixed * bool(captions), *self.concept_ids])

    @property
    def concept_ids(self) -> list[str]:
        """Hash of the lists of concepts that batches are picked by; none without such lists."""
        return [] if self._concepts is None else [self._concepts.id]

    @property
    def picks(self) -> bool:
        """True if batches are picked from super-batches, the rest of which no batch holds."""
        return self.options.composition in PICKS

    @property
    def taken(self) -> int:
        """Samples of the base order that one global batch uses."""
        return self.options.batch_size * (SUPER_BATCH if self.picks else 1)

    @property
    def window(self) -> int:
        """Samples of the base order in which no row comes twice."""
        steps = self.options.accumulation
        return self.taken * (steps + 1 if self.picks else steps)  # picks may move by a batch

    @property
    def per_lane(self) -> int:
        """Samples of one lane that one global batch uses."""
        return self.taken // self.options.lanes

    def batches_until(self, epoch: int) -> int:
        """Return the number of whole batches that the epochs first_epoch … epoch − 1 fill."""
        drawn = sum(self.drawn(earlier) for earlier in range(self.options.first_epoch, epoch))
        return drawn // self.options.lanes // self.per_lane

    def epoch_at(self, batch: int) -> int:
        """Return the plan's epoch that a batch starts in."""
        epoch, left = self.options.first_epoch, (batch * self.per_lane + 1) * self.options.lanes
        while left > self.drawn(epoch):
            left -= self.drawn(epoch)
            epoch += 1
        return epoch

    def drawn(self, epoch: int) -> int:
        """Return the number of samples that an epoch draws; rows are drawn only if the plan is not exact."""
        if epoch not in self._totals:
            exact = self.plan.exact
            self._totals[epoch] = int(
                self.plan.counts(epoch).sum() if exact else units_of(self.plan, epoch, keep=self._keep)[:, SIZE].sum()
            )
        return self._totals[epoch]

    def batch(self, number: int, part: int = 0, parts: int = 1) -> Samples:
        """Return flat samples of a global batch, or of one of `parts` equal parts of it, which divide the number of lanes.

        Sample i of the whole batch has position number · batch_size + i in the order.
        """
        span = self._span_of(number)
        size = self.options.batch_size
        mine = slice(part * size // parts, (part + 1) * size // parts)
        within = number - self._bounds[span]
        if self._is_plain(span):
            return self._spans.get((span, part, parts), lambda: self._base(span, part, parts)).take(within)
        whole = self._settled(span).take(within)
        return (self._pick(number, whole) if self.picks else whole).take(mine)

    def repeats(self, number: int) -> int:
        """Return the number of repeated samples in the step of a global batch, up to this batch; 0 at once if rows do not crowd."""
        begin = number - number % self.options.accumulation
        touched = range(
            *(self.sections.at(batch * self.per_lane - at) + at for batch, at in ((begin, 0), (number + 1, 1)))
        )
        if all(self._has_room(self.sections[at]) for at in touched):
            return 0
        rows = np.concatenate([self.batch(at).rows for at in range(begin, number + 1)])
        return len(rows) - len(np.unique(rows))

    def _has_room(self, section: Section) -> bool:
        return section.drawn >= ROOM * section.most_copies * self.window

    def block_at(self, batch: int) -> Block:
        """Return the block of all lanes that a batch starts in."""
        position = batch * self.per_lane
        number = self.sections.at(position)
        section = self.sections[number]
        blocks = self.sections.blocks(section)
        return number, ((position - section.first + 1) * blocks - 1) // section.length

    def block_after(self, block: Block) -> Block:
        """Return the next block."""
        number, place = block
        if place + 1 < self.sections.blocks(self.sections[number]):
            return number, place + 1
        number += 1
        while not self.sections[number].length:
            number += 1
        return number, 0

    def block_size(self, block: Block) -> int:
        """Return the samples of a block over all lanes; there may be one more in each."""
        section = self.sections[block[0]]
        return section.length // self.sections.blocks(section) * self.options.lanes

    def block_rows(self, block: Block, part: int = 0, parts: int = 1) -> npt.NDArray[np.int64]:
        """Return the rows of a block in the base order, of a part of the lanes, unit after unit: int64 [n]."""
        section = self.sections[block[0]]
        blocks = self.sections.blocks(section)
        start, stop = (place * section.length // blocks for place in (block[1], block[1] + 1))
        lanes = np.arange(part * self.options.lanes // parts, (part + 1) * self.options.lanes // parts)
        return self.sections.samples(section, (lanes[:, None] * section.length + np.arange(start, stop)).ravel()).rows

    def _span_of(self, batch: int) -> int:
        while self._bounds[-1] <= batch:
            self._append_spans()
        return bisect_right(self._bounds, batch) - 1

    def _append_spans(self) -> None:
        """Cut the next epoch's samples into spans of nearly equal length; if they are too few, they wait for the next epoch."""
        section = self.sections[self._next_section]
        self._next_section += 1
        begin, end = self._bounds[-1], -(-section.stop // self.per_lane)
        windows = (end - begin) // self.options.accumulation
        if windows < LEAST_SPAN_WINDOWS:
            return
        crowded = section.most_copies > 1 and not self._has_room(section)
        wanted = GREATEST_SPAN_SAMPLES if crowded else SPAN_SAMPLES
        count = min(max(1, round((end - begin) * self.taken / wanted)), windows // LEAST_SPAN_WINDOWS)
        self._bounds += [begin + (number + 1) * (end - begin) // count for number in range(count)]

    def _is_plain(self, span: int) -> bool:
        """Return whether the order is the base order: no row can come twice in this span or its neighbours."""
        if self.options.compose != "shuffle":
            return False
        first = self._bounds[max(span - 1, 0)] * self.per_lane
        while len(self._bounds) <= span + 2:
            self._append_spans()
        number = self.sections.at(first)
        section = self.sections[number]
        if self._bounds[span + 2] * self.per_lane > section.stop or section.most_copies > 1:
            return False
        carried = len(section.carried.rows)  # they are in the first lane, shuffled with the blocks that hold them
        return not carried or first > section.first + carried + section.length // self.sections.blocks(section)

    def _base(self, span: int, part: int, parts: int) -> Samples:
        """Return the base order of a part of a span: [batches, samples]."""
        lanes = np.arange(part * self.options.lanes // parts, (part + 1) * self.options.lanes // parts)
        first, stop = (self._bounds[span + at] * self.per_lane for at in (0, 1))
        pieces = []
        number = self.sections.at(first)
        at = first
        while at < stop:
            section = self.sections[number]
            end = min(section.stop, stop)
            if end > at:
                read = self._spread if self.options.compose == "spread" else self.sections.lane_samples
                pieces.append(read(section, lanes, at - section.first, end - section.first))
            at, number = max(at, end), number + 1
        return Samples(*(self._by_batch(np.concatenate(column, axis=1)) for column in zip(*pieces, strict=True)))

    def _by_batch(self, columns: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Turn [lanes, positions] into [batches, samples], each batch lane after lane."""
        lanes = len(columns)
        batches: npt.NDArray[Any] = columns.reshape(lanes, -1, self.per_lane).swapaxes(0, 1)
        return batches.reshape(-1, lanes * self.per_lane)

    def _settled(self, span: int) -> Samples:
        """Return a span with equal rows kept apart: [batches, samples]."""
        return self._spans.get((span, -1, 1), lambda: self._settle(span))

    def _settle(self, span: int) -> Samples:
        window = self.window
        before = after = None
        if span % 2:
            before = self._settled(span - 1).rows.ravel()[-window:]
            self._span_of(self._bounds[span + 1])
            after = self._settled(span + 1).rows.ravel()[:window]
        base = self._base(span, 0, 1)
        rows = base.rows.ravel()
        labels = self.plan.groups[rows] if self.options.compose == "spread" else None
        order = space_out(rows, window, before, after, labels)
        return Samples(rows[order].reshape(base.rows.shape), base.epochs.ravel()[order].reshape(base.rows.shape))

    def _spread(self, section: Section, lanes: npt.NDArray[np.int64], first: int, stop: int) -> Samples:
        """Return Sections.lane_samples with the samples of each chunk of the section dealt to its batches cluster by cluster."""
        chunks = max(1, ceil(section.length * self.options.lanes / GREATEST_SPAN_SAMPLES))
        inner = [number * section.length // chunks + section.first for number in range(1, chunks)]
        aligned = [bound - bound % self.per_lane - section.first for bound in inner]  # chunks meet between batches
        bounds = [0, *(bound for bound in aligned if bound > 0), section.length]
        pieces = []
        for number in range(len(bounds) - 1):
            begin, end = max(first, bounds[number]), min(stop, bounds[number + 1])
            if begin < end:
                arrange = partial(self._arrange, section, bounds[number], bounds[number + 1])
                chunk = self._chunks.get((section.epoch, bounds[number]), arrange)
                pieces.append(chunk.take((lanes, slice(begin - bounds[number], end - bounds[number]))))
        return Samples(*(np.concatenate(column, axis=1) for column in zip(*pieces, strict=True)))

    def _arrange(self, section: Section, first: int, stop: int) -> Samples:
        """Return positions first … stop − 1 of all lanes of a section, dealt to their batches: [lanes, positions]."""
        lanes = np.arange(self.options.lanes)
        base = self.sections.lane_samples(section, lanes, first, stop)
        batch = np.broadcast_to((section.first + np.arange(first, stop)) // self.per_lane, base.rows.shape).ravel()
        slots = np.argsort(batch, kind="stable")  # batch after batch, and lane after lane in each
        sizes = np.unique(batch, return_counts=True)[1]
        rows = base.rows.ravel()[slots]
        labels = self.plan.groups[rows]
        items = deal(labels, sizes, stream_key(self.options.seed, "spread", section.epoch, first))
        of_batch = np.repeat(np.arange(len(sizes)), sizes)
        items = slots[items[np.lexsort((items, of_batch))]]  # in their order within a batch: lanes stay together
        arranged = np.empty(base.rows.shape, np.int64)
        arranged.ravel()[slots] = items
        return Samples(base.rows.ravel()[arranged], base.epochs.ravel()[arranged])

    def _pick(self, number: int, chosen: Samples) -> Samples:
        """Return the fifth of a super-batch that covers its clusters or concepts best, or has the most concepts."""
        firsts = np.unique(chosen.rows, return_index=True)[1]  # a repeated row is picked once, if enough are left
        if len(firsts) >= self.options.batch_size:
            chosen = chosen.take(np.sort(firsts))
        if self._concepts is not None:
            pick = PICKS[self.options.composition]
            return chosen.take(pick(*self._concepts.of(chosen.rows), self.options.batch_size))
        labels = self.plan.groups[chosen.rows]
        frequencies = np.bincount(labels).astype(np.float64)
        key = stream_key(self.options.seed, "diverse", number)
        picked = pick_diverse(labels, frequencies, count=self.options.batch_size, key=key)
        return chosen.take(picked)
