"""Captions from tables, joined to samples by key, uid, sha256 or url; and captions from fields of the JSON in the tars.

Captions that samples get are copied to a file of text; a read plan (see `joining`) says where that of each row is. Then each part is
written in the order of its rows. Memory grows with neither the tables nor the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.captions import ORIGINAL, Captions, caption_columns
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.files import HashedStream, digest, file_digest, writing
from tailwise.catalog.kinds import CAPTIONS, Kind
from tailwise.catalog.rejections import Rejections, RejectionWriter
from tailwise.context import Context
from tailwise.errors import NotFoundError, UserError, check_share, refuse_many
from tailwise.mapped import release_pages
from tailwise.requests import CaptionsRequest, refuse_given
from tailwise.shards.columns import MAX_TEXT_BYTES, texts
from tailwise.shards.members import JSON_FIELD, MemberChoice, json_caption
from tailwise.shards.metadata import UNFIT, fitness
from tailwise.shards.noted import jsons_of
from tailwise.sources.embedding_files import NamedRows, Naming
from tailwise.sources.tar_files import find_tables
from tailwise.steps.importing.join import NO_KEY, column_names, read_columns
from tailwise.steps.importing.joining import INDEX, Join, PartFiles, Wording
from tailwise.steps.importing.rows import RowFinder
from tailwise.storage.local import scratch
from tailwise.text import did_you_mean

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
KINDS: dict[str, Naming] = {
    "uid": "uid",
    "key": "key",
    "image_path": "key",
    "sha256": "sha256",
    "md5": "md5",
    "url": "url",
}
COLUMNS = ("caption", "text", "re_caption", "recaption")  # that hold captions, where the user names none
EMPTY, LONG, NOT_UTF8 = "no {} in the row", "{} is too long", "{} is not UTF-8"
NO_TEXT = "no caption in the JSON"
WORDING = Wording("captions", "caption", "joining captions")


@dataclass
class JoinedCaptions:
    """Result of a join of captions."""

    captions: Captions  # what was made
    rejections: Rejections = field(default_factory=Rejections)  # rows of the tables that no sample got, by reason


def join_captions(
    catalog: Catalog | str | Path,
    tables: Sequence[str | Path],
    request: CaptionsRequest,
    context: Context | None = None,
) -> JoinedCaptions:
    """Make captions of the newest snapshot from tables; open those that were made of the same.

    `tables`: .parquet, .csv, .tsv or .jsonl files; folders and patterns of them. The first caption of a sample is taken. Or one text
    json:FIELD, see `MemberChoice`: then captions are read from the JSON of each sample. `request`: name of the captions, and which columns.

    Raises:
        UserError: a table cannot be read, not one caption belongs to a sample, or too many rows are unusable.
    """
    context = context or Context()
    catalog = Catalog.open(catalog)
    check_share(request.max_rejected)
    if request.name == ORIGINAL:
        raise UserError(f"`name` {ORIGINAL}: samples' own captions are called so; give another name")
    snapshot = catalog.snapshot()
    fields, paths = _fields([str(table) for table in tables], request), list[Path]()
    by, id_column, column = "json", "", ",".join(fields)
    if not fields:
        paths = find_text_tables([str(table) for table in tables])
        by, id_column, column = choose_columns(paths[0], request, COLUMNS)
    config = {"by": by, "id_column": id_column, "column": column}

    def write(artifact: Artifact, work: Path, log: RejectionWriter) -> dict[str, Any]:
        if fields:
            captions, rows = _read_jsons(artifact, catalog, snapshot, fields, log, context), snapshot.rows
        else:
            found = [TextTable(path, id_column, column, KINDS[by]) for path in paths]
            items, join = join_texts(catalog, snapshot, found, request.max_rejected, work, log, context)
            for item in context.progress(items, "writing captions", len(items)):
                _write(artifact, join, item)
            captions, rows = join.matched, join.read
        reasons = {reason: count for (_, reason), count in sorted(log.counts.items())}
        return {"captions": captions, "rows": rows, "reasons": reasons, "tables": list(map(str, paths))}

    made = make_row_lists(
        CAPTIONS, catalog, request.name, config, {"tables": digest(list(map(file_digest, paths)))}, write
    )
    return JoinedCaptions(Captions(catalog, request.name), made)


def make_row_lists(
    kind: Kind,
    catalog: Catalog,
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    write: Callable[[Artifact, Path, RejectionWriter], Mapping[str, Any]],
) -> Rejections:
    """Make captions or concepts of the newest snapshot, unless they are finished; return the rows that no sample got.

    `write` writes the columns, with a folder for the work and a log of rows that no sample gets, and returns the summary.
    """
    snapshot, made = catalog.snapshot(), Rejections()
    config, inputs = {"snapshot": snapshot.number, **config}, {"snapshot": snapshot.id, **inputs}
    listed = layout.rejected_log(catalog.folder, kind.folder, name)
    with Artifact(kind.path(catalog.folder, name), kind.section, config, inputs) as artifact:
        if not artifact.done:
            with scratch(artifact.folder / layout.JOINING, own=True) as work, made.writer(listed) as log:
                figures = write(artifact, work, log)
            artifact.finish({"samples": snapshot.rows, **figures})
    return made


def _fields(sources: Sequence[str], request: CaptionsRequest) -> tuple[str, ...]:
    """Return the fields of JSON that are asked for in place of tables; none for tables."""
    if not any(source.startswith(JSON_FIELD) for source in sources):
        return ()
    if len(sources) > 1:
        raise UserError(
            f"{JSON_FIELD}FIELD can't be combined with tables: give it alone, and join each under a name of its own"
        )
    refuse_given(request, {"by", "id_column", "column"}, f"with {sources[0]}")
    choice = MemberChoice.given(None, sources[0])
    if len(choice.fields) < len(choice.captions):
        raise UserError(f"{sources[0]!r}: give fields of the JSON alone, such as json:alt.text,json:title")
    return choice.fields


def find_text_tables(sources: Sequence[str]) -> list[Path]:
    """Return the tables that sources name, without duplicates, in order."""
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source).expanduser().absolute()
        here = [path] if path.is_file() else [item for suffix in SUFFIXES for item in find_tables(source, suffix)]
        if not here:
            raise NotFoundError(
                f"{source!r} is no table: give a local {', '.join(SUFFIXES)} file, a folder or a pattern of them"
            )
        found |= dict.fromkeys(here)
    return list(found)


def choose_columns(path: Path, request: CaptionsRequest, usual: Sequence[str]) -> tuple[str, str, str]:
    """Return what names the samples, a key of KINDS, its column in the tables, and the column of values, by the first table.

    `usual` are names of columns of values, for a request that gives none.
    """
    if request.by is not None and request.by not in KINDS:
        raise UserError(f"`by` {request.by!r}: {did_you_mean(request.by, KINDS)}")
    names = column_names(path)
    by = request.by or next((name for name in KINDS if _column(names, None, name)), None)
    id_column = _column(names, request.id_column, by or "")
    column = _column(names, request.column, *usual)
    there = f"{path} has the columns {', '.join(names)}, and none called"
    if by is None or id_column is None:
        wanted = request.id_column or request.by or ", ".join(KINDS)
        raise UserError(f"{there} {wanted}: say with `by` and `id_column` what names the samples")
    if column is None:
        raise UserError(f"{there} {request.column or ', '.join(usual)}: give `column`")
    return by, id_column, column


def _column(names: Sequence[str], given: str | None, *usual: str) -> str | None:
    """Return the given column, or the first usual one, in any case of letters; None where the table lacks it."""
    if given is not None:
        return given if given in names else None
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in usual if name in lower), None)


@dataclass(frozen=True)
class TextTable(NamedRows):
    """A table of captions, or of other texts."""

    path: Path
    id_column: str
    column: str
    naming: Naming
    what: str = "captions"  # the texts are called, in errors

    def batches(self) -> Iterator[tuple[pa.Array, pa.Array]]:
        """Yield identifiers and texts, as strings; a UserError if the table cannot be read."""
        _, columns = read_columns(self.path, self.column, self.what, self.id_column, self.naming)
        for names, values in columns:
            try:
                captions = self.texts_of(values)
            except ValueError as error:
                raise UserError(f"{self.path} has no {self.what} in column {self.column!r}: {error}") from error
            found = ["" if name == NO_KEY else name for name in names]
            yield pa.array(found, pa.string()), captions

    def texts_of(self, values: pa.Array) -> pa.Array:
        """Return values of the column as strings; a ValueError if they are of another type."""
        return texts(values, self.column, check=False)

    def names(self) -> Iterable[pa.Array]:
        """Yield the identifiers."""
        return (names for names, _ in self.batches())

    def rows(self, unpacked: Path) -> npt.NDArray[Any]:
        """Return first byte and length of each caption in the file of the text, int64 [n, 2]."""
        return (
            np.memmap(unpacked, np.int64, "r").reshape(-1, 2) if unpacked.stat().st_size else np.empty((0, 2), np.int64)
        )


def join_texts(
    catalog: Catalog,
    snapshot: Snapshot,
    tables: Sequence[TextTable],
    max_rejected: float,
    work: Path,
    log: RejectionWriter,
    context: Context,
    wording: Wording = WORDING,
) -> tuple[list[PartFiles], Join]:
    """Copy the texts that samples get; return the parts with the tables that their rows are read from, and the join.

    `work` is a folder for the copies, `log` takes the rows that no sample gets; the other arguments are those of `join_captions`.
    """
    parts, many = catalog.parts(snapshot), wording.stage
    finder = RowFinder(catalog, parts, work / INDEX, None)
    join = Join(parts, finder, work, log, wording)
    finder.note_tars(tables)
    for number, table in enumerate(context.progress(tables, wording.step, len(tables))):
        _copy(join, number, table, wording.value)
    reasons = ", ".join(f"{reason}: {rows:,}" for (_, reason), rows in sorted(log.counts.items()))
    if not join.matched:
        first = catalog.samples(parts[0], ["key", "uid"]).slice(0, 1).to_pylist()[0]
        why = f"none of the {many} in {tables[0].path} belongs to a sample ({reasons or 'there are none'})"
        if unmatched := join.first_unmatched_key:
            named = f"key {first['key']!r}, uid {first['uid'].hex()}"
            why += f": the first one's {tables[0].naming} is {unmatched!r}, the first sample's {named}"
        raise UserError(why)
    refuse_many(join.faulty, join.read, max_rejected, f"{{}} {many}{{}} can't be used", reasons)
    return join.part_files(parts, tables), join


def _copy(join: Join, number: int, table: TextTable, what: str) -> None:
    """Plan the rows of a table, and write text and place, int64 [n, 2], of each one that a sample gets; `what` it is called."""
    places = join.plan.unpacked(number)
    start = written = 0
    with places.open("wb") as place_stream, _text_of(places).open("wb") as text_stream:
        for given, texts_given in table.batches():
            good = _usable(join, table, given, texts_given, what)
            names, captions = given.filter(good), texts_given.filter(good)
            keep = join.plan_chunk(number, table, start, names, None, own=False)
            content = [text.encode() for text in captions.filter(pa.array(keep)).to_pylist()]
            sizes = np.zeros(len(names), np.int64)
            sizes[keep] = list(map(len, content))
            place_stream.write(np.stack([written + np.cumsum(sizes) - sizes, sizes], axis=1).tobytes())
            text_stream.write(b"".join(content))
            start, written = start + len(names), written + int(sizes.sum())


def _usable(join: Join, table: TextTable, names: pa.Array, captions: pa.Array, what: str) -> pa.Array:
    """Return which rows have a text, and reject the others."""
    state = fitness(captions)
    state[pc.equal(pc.binary_length(captions), 0).fill_null(False).to_numpy(zero_copy_only=False)] = UNFIT[0]
    for unfit, reason in zip(UNFIT, (EMPTY, LONG, NOT_UTF8), strict=True):
        rows = np.flatnonzero(state == unfit).tolist()
        for at in rows:
            join.reject(reason.format(what), table.path, names[at].as_py())
        join.read += len(rows)
        join.faulty += len(rows) * (reason != EMPTY)
    return pa.array(state == "")


def _text_of(places: Path) -> Path:
    return places.with_suffix(".text")


def text_sizes(join: Join, item: PartFiles) -> npt.NDArray[np.int64]:
    """Return the bytes of the text of each row of a part: int64 [rows], 0 where there is none."""
    sizes = [values[:, 1].copy() for _, values in join.plan.values(item, 2, np.int64)]
    return np.concatenate([np.empty(0, np.int64), *sizes])


def joined_texts(join: Join, item: PartFiles) -> Iterator[list[memoryview]]:
    """Yield the texts of a part, UTF-8, in the order of its rows, without rows that have none: some rows at a time."""
    part, files = item
    sources = {number: _text_of(join.plan.unpacked(number)) for number in files}
    maps = {number: np.memmap(path, np.uint8, "r") for number, path in sources.items() if path.stat().st_size}
    views = {number: array.data for number, array in maps.items()}
    rows = join.plan.rows(part)
    for span, values in join.plan.values(item, 2, np.int64):
        there = np.flatnonzero(values[:, 1])
        numbers, places = rows[span]["file"][there].tolist(), values[there].tolist()
        yield [views[number][at : at + size] for number, (at, size) in zip(numbers, places, strict=True)]
    for array in maps.values():
        release_pages(array)


def _write(artifact: Artifact, join: Join, item: PartFiles) -> None:
    part, sizes = item[0], text_sizes(join, item)
    caption_columns(artifact)[0].write(part, np.cumsum(sizes, dtype=np.int64))
    with _writing_text(artifact, part, int(sizes.sum())) as stream:
        for pieces in joined_texts(join, item):
            stream.write(b"".join(pieces))


@contextmanager
def _writing_text(artifact: Artifact, part: Part, size_bytes: int) -> Iterator[HashedStream]:
    """Yield a stream to the text of a part, of `size_bytes`."""
    with writing(caption_columns(artifact)[1].path(part)) as stream:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(stream, {**header, "shape": (size_bytes,)})
        yield stream


def _read_jsons(
    artifact: Artifact,
    catalog: Catalog,
    snapshot: Snapshot,
    fields: tuple[str, ...],
    log: RejectionWriter,
    context: Context,
) -> int:
    """Write the captions of all parts, which the samples' JSON holds; return how many there are."""
    found, parts = 0, catalog.parts(snapshot)
    for part in context.progress(parts, "reading captions", len(parts)):
        contents = []
        for path, key, content in jsons_of(catalog, part):
            caption = b""
            with suppress(OSError):
                caption = json_caption(content, fields)
            if not caption or len(caption) > MAX_TEXT_BYTES:
                log.add("captions", LONG.format("caption") if caption else NO_TEXT, path, key)
                caption = b""
            contents.append(caption)
            found += bool(caption)
        ends = np.cumsum(list(map(len, contents)), dtype=np.int64)
        caption_columns(artifact)[0].write(part, ends)
        with _writing_text(artifact, part, int(ends[-1])) as stream:
            stream.write(b"".join(contents))
    if not found:
        for written in (column.path(part) for part in parts for column in caption_columns(artifact)):
            written.unlink()  # so that another field can have this name
        raise UserError(
            f"no sample of {catalog.folder} has a caption in {' or '.join(fields)} of its .json: name another field"
        )
    return found
