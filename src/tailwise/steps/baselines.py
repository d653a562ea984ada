"""DataComp's six baselines (arXiv 2304.14108), from its metadata: the uids that the functions of its toolkit choose.

A map judges the rows of each metadata file and writes uid, facts and CLIP score by the leading bits of the uid; a reduce sorts each bucket
and writes its share of each subset. Thus each file is read once for all baselines, and memory does not grow with the pool. No catalog is
made: it would hold float32 scores and distinct samples, where the toolkit compares the scores as they are stored and repeats a uid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits

from tailwise.catalog.outputs import check_output_folder, is_array, scratch_beside, writing_output
from tailwise.context import Context
from tailwise.errors import NotFoundError, UserError
from tailwise.execution.base import KERNEL, WithWorker, Worker
from tailwise.execution.keys import ABSENT, bits_of_buckets, buckets_of, find_sorted
from tailwise.execution.shuffle import Records, Shuffle
from tailwise.kernels.captions import LISTED, SIX_CHARACTERS, THREE_WORDS, TWO_TOKENS, CaptionFacts
from tailwise.kernels.grid import row_chunks
from tailwise.kernels.inner_products import InnerProducts
from tailwise.kernels.selection import order_statistics
from tailwise.requests import BaselinesRequest
from tailwise.shards.columns import BATCH_ROWS, DAMAGE, numbers, open_table, texts, uid_texts
from tailwise.shards.metadata import parse_uids
from tailwise.sources.datacomp import UID
from tailwise.sources.embedding_files import StoredRows, matrix_fault, reading_member
from tailwise.steps.importing.join import column_names, read_table_columns

ENGLISH, LAION_ENGLISH, BASIC, SIMILAR, ENTITY, NEAR, TOP = (1 << bit for bit in range(7))  # facts of a sample
LEAST_SIDE, MOST_ASPECT = 200, 3.0
LEAST_B32 = 0.28
TOP_SHARE = 0.3
B32, L14 = (f"clip_{model}_similarity_score" for model in ("b32", "l14"))
SIDES = ("original_width", "original_height")
MEMBER = "l14_img"
BUCKET_ROWS = 1_000_000
GROUP_ROWS = 262_144  # rows of files that are judged side by side
_TABLES = (".parquet", ".csv", ".tsv", ".jsonl")
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("score", "<f8"), ("facts", "u1")])
_LANGUAGE = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])  # row: 1 for English


FACTS: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {  # columns of the metadata, options of the request
    ENGLISH: ((), ("language",)),
    LAION_ENGLISH: ((), ("laion_language",)),
    BASIC: (("text", *SIDES), ()),
    SIMILAR: ((B32,), ()),
    ENTITY: (("text",), ("entities",)),
    NEAR: (("text",), ("centroids", "target")),
    TOP: ((L14,), ()),
}
BASELINES = {  # by the toolkit's names: the facts that a sample must have
    "basic_filter": ENGLISH | BASIC,
    "clip_score": TOP,
    "laion2b": LAION_ENGLISH | SIMILAR,
    "text_based": ENGLISH | ENTITY,
    "image_based": ENGLISH | NEAR,
    "image_based_intersect_clip_score": ENGLISH | NEAR | TOP,
}


@dataclass(frozen=True)
class Subsets:
    """Result of `write_baselines`.

    Attributes:
        samples: rows of the metadata.
        kept: uids of each subset.
        threshold: least L/14 score among the top 30 %; None where no baseline needs it.
        unknown: of each table of languages, samples that it does not name.
    """

    samples: int
    kept: Mapping[str, int]
    threshold: float | None
    unknown: Mapping[str, int]


def write_baselines(
    metadata: Path, output: Path, request: BaselinesRequest, context: Context | None = None, *, overwrite: bool = False
) -> Subsets:
    """Write OUTPUT/NAME.npy for each baseline: a sorted 1-D array of dtype "u8,u8", which DataComp's resharder reads.

    Args:
        metadata: folder of `X.parquet`, and `X.npz` for the image-based baselines.
        output: folder of the subsets.
        request: which baselines, and what they are made from.
        context: runs the tasks and shows progress.
        overwrite: whether existing subsets with other bytes may be replaced.

    Raises:
        UserError: an option is missing, a file can't be read, or has other rows or columns than the metadata should have.
    """
    context = context or Context()
    paths = sorted(metadata.glob("*.parquet"))
    if not paths:
        raise NotFoundError(f"{metadata} is no folder with .parquet files: give that of DataComp's metadata")
    request = replace(request, laion_language=request.laion_language or request.language)
    asked = _asked(request)
    rows = {path: _rows(path) for path in paths}
    samples, groups = sum(rows.values()), _groups(rows)
    judge = _Judge(request, asked)
    judge.check()
    check_output_folder(output, "OUTPUT", [f"{name}.npy" for name in BASELINES]).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.callback(context.executor.forget)  # what the options name may change until the next call
        # Before the work: another command may have these files, or they may not be ours.
        subsets = {name: stack.enter_context(_Subset.writing(output, name, overwrite)) for name in asked}
        work = stack.enter_context(scratch_beside(output / asked[0]))
        shuffle = Shuffle(work / "judged", _RECORD, 1 << bits_of_buckets(samples, BUCKET_ROWS))
        context.run(WithWorker(partial(_judge_files, judge, shuffle)), [*groups.items()], "judging samples", KERNEL)
        threshold = _threshold(shuffle, [*groups], samples) if judge.facts & TOP else math.nan
        tables = [_Languages(path, facts, work, shuffle.buckets, context) for path, facts in judge.tables().items()]
        seen = 0  # facts that some sample has
        for bucket in context.progress(range(shuffle.buckets), "writing subsets", shuffle.buckets):
            records = shuffle.read([*groups], bucket)
            records["facts"] |= np.where(records["score"] >= threshold, TOP, 0).astype(np.uint8)
            for table in tables:
                table.mark(records, bucket)
            seen |= int(np.bitwise_or.reduce(records["facts"]))
            records = _by_uid(records)
            for name, subset in subsets.items():
                subset.add(records[(records["facts"] & BASELINES[name]) == BASELINES[name]])
        kept = {name: subset.finish() for name, subset in subsets.items()}
        for fact, language in judge.languages.items():
            if samples and not seen & fact:
                raise UserError(
                    f"not one of {samples:,} samples is in English by {language}: English is 'en', and a table names the uids of this "
                    "metadata"
                )
    unknown = {str(table.path): table.unknown for table in tables}
    return Subsets(samples, kept, None if math.isnan(threshold) else threshold, unknown)


def _asked(request: BaselinesRequest) -> list[str]:
    """Return the names of the baselines that are asked for; refuse missing options."""
    asked = [name for name in BASELINES if name in (request.only or BASELINES)]
    for name in request.only:
        if name not in BASELINES:
            raise UserError(f"`only` {name}: the baselines are {', '.join(BASELINES)}")
    for name in asked:
        for option in (option for fact, (_, options) in FACTS.items() if BASELINES[name] & fact for option in options):
            if getattr(request, option) is None:
                raise UserError(f"{name} needs `{option}`: give it, or name the baselines to write with `only`")
    return asked


def _rows(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except DAMAGE as error:
        raise UserError(f"{path} can't be read: {error}") from error


def _groups(rows: Mapping[Path, int]) -> dict[str, list[Path]]:
    """Return files in order, in groups of about GROUP_ROWS rows, by a name."""
    groups = dict[str, list[Path]]()
    done = 0
    for path, count in rows.items():
        groups.setdefault(f"{done // GROUP_ROWS:08d}", []).append(path)
        done += count
    return groups


# --- the map ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judge:
    """Finds the facts of samples. Pickled as what was asked for; made again where it runs."""

    request: BaselinesRequest
    asked: Sequence[str]

    @property
    def facts(self) -> int:
        return int(np.bitwise_or.reduce([BASELINES[name] for name in self.asked]))

    @cached_property
    def languages(self) -> dict[int, str]:
        """Column or table of the languages that each fact is found by."""
        facts = [fact for fact in (ENGLISH, LAION_ENGLISH) if self.facts & fact]
        return {fact: getattr(self.request, FACTS[fact][1][0]) for fact in facts}

    @cached_property
    def columns(self) -> list[str]:
        """Columns of the metadata that are read."""
        found = ["uid", *(column for fact, (columns, _) in FACTS.items() if self.facts & fact for column in columns)]
        return [*dict.fromkeys([*found, *(name for name in self.languages.values() if not _is_table(name))])]

    @cached_property
    def captions(self) -> CaptionFacts:
        if not self.facts & ENTITY or self.request.entities is None:
            return CaptionFacts()
        path = self.request.entities
        try:
            words = {line.strip().lower() for line in path.read_text("utf-8-sig").splitlines()} - {""}
        except DAMAGE as error:
            raise UserError(f"`entities` {path} can't be read: {error}") from error
        if not words:
            raise UserError(f"`entities` {path} is empty: write a word a line")
        return CaptionFacts(words)

    @cached_property
    def near(self) -> tuple[InnerProducts, npt.NDArray[np.bool_]] | None:
        """The centroids, and which of them are the nearest of a target: bool [K]; None if no baseline needs them."""
        if not self.facts & NEAR or self.request.centroids is None or self.request.target is None:
            return None
        stored = _matrix("centroids", self.request.centroids)
        columns = stored[:]
        if not np.isfinite(columns).all() or not columns.any():
            raise UserError(f"`centroids` {self.request.centroids}: all numbers must be finite, and not all zero")
        targets, products = _matrix("target", self.request.target), InnerProducts(columns)
        if targets.shape[1] != stored.shape[1]:
            raise UserError(
                f"`target` {self.request.target} has {targets.shape[1]} dimensions, and `centroids` {stored.shape[1]}: "
                "give embeddings of the same model"
            )
        held, blocks = np.zeros(len(stored), np.bool_), list[Any]([targets])
        with threadpool_limits(1, "blas"):
            for _, chunk in row_chunks(blocks, BATCH_ROWS):
                labels = products(chunk)
                held[labels[labels >= 0]] = True
        if not held.any():
            raise UserError(f"`target` {self.request.target}: not one of its rows holds finite numbers")
        return products, held

    def check(self) -> None:
        """Read what the options name; a UserError if something is wrong."""
        _ = self.captions, self.near
        for path in self.tables():
            names = column_names(path)
            for name in ("uid", "language"):
                if (count := names.count(name)) != 1:
                    raise UserError(
                        f"{path} has {count} columns called {name!r}, and must have one; it has {', '.join(names)}"
                    )

    def tables(self) -> dict[Path, int]:
        """Return the tables of languages, and the facts that each gives."""
        found = dict[Path, int]()
        for fact, name in self.languages.items():
            if _is_table(name):
                found[Path(name)] = found.get(Path(name), 0) | fact
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"request": self.request, "asked": self.asked}

    def records(self, path: Path) -> Iterator[Records]:
        """Yield the records of a metadata file."""
        try:
            yield from self._records(path)
        except DAMAGE as error:
            raise UserError(f"{path} can't be used: {error}") from error

    def _records(self, path: Path) -> Iterator[Records]:
        with open_table(path, self.columns) as table, ExitStack() as stack:
            stream: IO[bytes] | None = None
            if self.near is not None:
                dimension = self.near[0].dimension
                header, stream = stack.enter_context(reading_member(path.with_suffix(".npz"), MEMBER))
                if fault := matrix_fault(header.shape, header.dtype, dimension):
                    raise ValueError(f"{MEMBER} of its .npz: {fault.reason}: {fault.detail}")
                if header.fortran:
                    raise ValueError(f"{MEMBER} of its .npz is stored by columns: save it as numpy.ascontiguousarray")
                if header.shape[0] != table.metadata.num_rows:
                    raise ValueError(
                        f"{MEMBER} of its .npz has {header.shape[0]:,} rows, and it has {table.metadata.num_rows:,}"
                    )
                stream_rows = partial(_next_rows, stream, header.dtype, dimension)
            for batch in table.iter_batches(BATCH_ROWS, self.columns):
                yield self._judged(batch, stream_rows(len(batch)) if stream is not None else None)

    def _judged(self, batch: pa.RecordBatch, embeddings: npt.NDArray[Any] | None) -> Records:
        records = np.zeros(len(batch), _RECORD)
        uids, good = parse_uids(uid_texts(batch.column("uid")))
        if not good.all():
            value = batch.column("uid")[int(np.argmin(good))].as_py()
            raise ValueError(f"uid {value!r} is not 32 hexadecimal digits")
        records["high"], records["low"] = np.ascontiguousarray(uids).view(">u8").reshape(-1, 2).T
        facts = np.zeros(len(batch), np.int64)
        for fact, name in self.languages.items():
            if not _is_table(name):
                facts |= _mask(pc.equal(texts(batch.column(name), name), "en")) * fact
        if self.facts & SIMILAR:
            facts |= (_scores(batch, B32) >= _stored(LEAST_B32, batch.column(B32).type)) * SIMILAR
        if self.facts & TOP:
            records["score"] = _scores(batch, L14)
        if "text" in self.columns:
            seen = self.captions(texts(batch.column("text"), "text").fill_null(""))
            long = seen & SIX_CHARACTERS > 0
            facts |= (seen & LISTED > 0) * ENTITY
            if self.facts & BASIC:
                facts |= ((seen & THREE_WORDS > 0) & long & _fit(batch)) * BASIC
            if self.near is not None and embeddings is not None:
                judged = (seen & TWO_TOKENS > 0) & long
                if not _is_table(self.languages[ENGLISH]):
                    judged &= facts & ENGLISH > 0
                products, held = self.near
                labels = products(embeddings[judged])
                facts[judged] |= np.where(labels >= 0, held[labels], False) * NEAR
        records["facts"] = facts
        return records if self.facts & TOP or self.tables() else records[facts > 0]


def _judge_files(judge: _Judge, shuffle: Shuffle, group: tuple[str, Sequence[Path]], worker: Worker) -> None:
    """Write the records of a group of files, which threads judge side by side; a file alone, which may be long, as it is read."""
    judge = worker.cached(repr(judge), lambda: judge)
    judge.check()
    (name, paths), bits = group, shuffle.buckets.bit_length() - 1
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(worker.cpus) as pool:
        several = pool.map(lambda path: [*judge.records(path)], paths) if len(paths) > 1 else map(judge.records, paths)
        shuffle.write(name, ((buckets_of(piece, bits), piece) for pieces in several for piece in pieces))


def _is_table(language: str) -> bool:
    return Path(language).suffix.lower() in _TABLES


def _mask(values: pa.Array) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = values.fill_null(False).to_numpy(zero_copy_only=False)
    return found


def _scores(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = numbers(batch.column(name), name).to_numpy(zero_copy_only=False)
    return found


def _stored(bound: float, kind: pa.DataType) -> float:
    """Return a bound in the precision of a column, in which the toolkit compares."""
    return float(kind.to_pandas_dtype()(bound)) if pa.types.is_floating(kind) else bound


def _fit(batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """Return which images are large enough, and not too long: bool [n]."""
    width, height = (_scores(batch, name) for name in SIDES)
    least, most = np.minimum(width, height), np.maximum(width, height)
    fit: npt.NDArray[np.bool_] = (least >= LEAST_SIDE) & (most <= MOST_ASPECT * least)
    return fit


def _next_rows(stream: IO[bytes], dtype: np.dtype[Any], dimension: int, rows: int) -> npt.NDArray[Any]:
    """Return the next rows of an array [n, dimension]."""
    return np.frombuffer(stream.read(rows * dimension * dtype.itemsize), dtype).reshape(rows, dimension)


def _matrix(option: str, path: Path) -> StoredRows:
    try:
        stored = StoredRows.of_file(path)
    except DAMAGE as error:
        raise UserError(f"`{option}` {path} can't be read as .npy: {error}") from error
    if (fault := matrix_fault(stored.shape, stored.dtype, None)) or not len(stored):
        detail = fault.detail if fault else "no rows"
        raise UserError(f"`{option}` {path} holds {detail}: give embeddings, float16 or float32 [n, d]")
    return stored


# --- the reduce -------------------------------------------------------------------------------------------------------


class _Languages:
    """A table of languages, by uid, sorted into the buckets of the samples."""

    def __init__(self, path: Path, facts: int, work: Path, buckets: int, context: Context) -> None:
        self.path, self.unknown = path, 0  # samples that it does not name
        self._facts, self._shuffle = facts, Shuffle(work / f"languages {facts}", _LANGUAGE, buckets)

        def chunks() -> Iterator[tuple[npt.NDArray[np.int64], Records]]:
            batches = read_table_columns(path, ["uid", "language"])
            for uids, languages in context.progress(batches, f"reading {path.name}"):
                found, good = parse_uids(uid_texts(uids))
                entries = np.zeros(int(good.sum()), _LANGUAGE)
                entries["high"], entries["low"] = np.ascontiguousarray(found).view(">u8").reshape(-1, 2).T
                entries["row"] = _mask(pc.equal(texts(languages, "language"), "en"))[good]
                yield buckets_of(entries, buckets.bit_length() - 1), entries

        try:
            self._shuffle.write("all", chunks())
        except DAMAGE as error:
            raise UserError(f"{path} can't be read: {error}") from error

    def mark(self, records: Records, bucket: int) -> None:
        """Add the facts to the records of a bucket."""
        entries = self._shuffle.read(["all"], bucket)
        entries = entries[np.lexsort((-entries["row"], entries["low"], entries["high"]))]  # English first
        rows = find_sorted(entries, np.ascontiguousarray(entries["high"]), records)
        records["facts"] |= np.where(rows == 1, self._facts, 0).astype(np.uint8)
        self.unknown += int((rows == ABSENT).sum())


def _by_uid(records: Records) -> Records:
    """Return records ascending by uid; the halves that come second decide where the first are equal."""
    found = records[np.argsort(records["high"])]
    equal = found["high"][1:] == found["high"][:-1]
    return found[np.lexsort((found["low"], found["high"]))] if equal.any() else found


def _threshold(shuffle: Shuffle, names: Sequence[str], samples: int) -> float:
    """Return the score at place int(samples · TOP_SHARE) from the top, as the toolkit; NaN, above which nothing is, if few have one."""

    def scores() -> Iterator[npt.NDArray[np.float64]]:
        for bucket in range(shuffle.buckets):
            found = shuffle.read(names, bucket)["score"]
            yield found[~np.isnan(found)]

    with np.errstate(over="ignore"):  # rounding keeps the order: the place is found among rounded scores first
        rank = sum(map(len, scores())) - 1 - int(samples * TOP_SHARE)
        if rank < 0:
            return math.nan
        (value,), (below,) = order_statistics(lambda: (piece.astype(np.float32) for piece in scores()), [rank])
        equal = np.concatenate([piece[piece.astype(np.float32) == value] for piece in scores()])
    return float(np.partition(equal, rank - below)[rank - below])


class _Subset:
    """A subset that is written in pieces, its length last."""

    @classmethod
    @contextmanager
    def writing(cls, folder: Path, name: str, overwrite: bool) -> Iterator[_Subset]:
        """Open the file of a baseline; publish it afterwards."""
        path = folder / f"{name}.npy"
        with (
            writing_output(path, None, overwrite=overwrite, is_ours=is_array(UID)) as temporary,
            temporary.open("wb") as stream,
        ):
            yield cls(stream)

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._kept = stream, 0
        self._write_header()

    def _write_header(self) -> None:
        """Write the header, of 128 bytes for any length."""
        header = np.lib.format.header_data_from_array_1_0(np.empty(0, UID))
        np.lib.format.write_array_header_1_0(self._stream, {**header, "shape": (self._kept,)})

    def add(self, records: Records) -> None:
        """Write the uids of some records."""
        self._kept += len(records)
        uids = np.empty(len(records), UID)
        uids["f0"], uids["f1"] = records["high"], records["low"]
        self._stream.write(uids.data)

    def finish(self) -> int:
        """Write the length into the header; return it."""
        self._stream.seek(0)
        self._write_header()
        return self._kept
