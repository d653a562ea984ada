"""Embedding columns: float16, unit-norm rows, written part by part. A column has a name, and a modality: of what it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.columns import RowColumn
from tailwise.catalog.files import read_record, write_record, writing
from tailwise.catalog.kinds import check_name
from tailwise.errors import ConflictError, UserError
from tailwise.text import command_line, did_you_mean

MODALITIES = ("image", "text")  # also the names of the columns that are made where no name is given
ENCODER = "imported"  # of columns whose embeddings were imported
JOINT = "joint"  # modality of a column that was made of others
ROW_FAULTS = ("NaN or Inf", "zero norm")
BLOCK_ROWS = 256  # stay in a processor's caches


def normalise_rows(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float16], dict[int, str]]:
    """Scales rows to unit norm.

    `rows`: [n, d].

    Returns:
        float16 [n, d], where a row that can't be scaled is all zeros, and the fault of each such row by index.
    """
    scaled, faults = np.empty(rows.shape, np.float16), dict[int, str]()
    for start in range(0, len(rows), BLOCK_ROWS):
        wide = rows[start : start + BLOCK_ROWS].astype(np.float64)
        squares = np.einsum("nd,nd->n", wide, wide)
        finite = np.isfinite(squares)
        good = finite & (squares > 0)
        np.divide(wide, np.sqrt(np.where(good, squares, 1.0))[:, None], out=wide)
        wide[~good] = 0
        scaled[start : start + BLOCK_ROWS] = wide
        faults |= {start + int(at): ROW_FAULTS[int(finite[at])] for at in np.flatnonzero(~good)}
    return scaled, faults


def open_column(
    catalog: Catalog,
    column: str,
    dimension: int,
    encoder: str,
    modality: str | None = None,
    settings: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Makes a column, or checks that rows of this encoder and dimension may be added to it.

    Args:
        catalog: whose.
        column: its name.
        dimension: width d.
        encoder: its name.
        modality: of MODALITIES; None for that of the column's name.
        settings: what decides an encoder's rows, as JSON values: architecture, hash of the weights, preprocessing, precision, … Where it is
            given, it is compared in place of the name, so that a checkpoint may move.
        versions: of libraries when the column is created; noted, not compared.

    Raises:
        UserError: it was made by another encoder, or has another dimension or modality.
    """
    path = _record(catalog, check_name(column))
    asked: dict[str, Any] = {"dimension": dimension, "encoder": encoder, "modality": modality or column}
    if settings is not None:
        asked["settings"] = dict(settings)
    if not path.exists() or not any(part_markers(path.parent)):  # a column without a part belongs to no encoder yet
        write_record(path, {**asked, "versions": dict(versions)} if versions else asked)
        return
    found = read_record(path)
    same_encoder = found["encoder"] == encoder if settings is None else _settings(found) == settings
    if found["modality"] != asked["modality"]:
        raise ConflictError(f"column {column!r} is of {found['modality']}, not of {modality}: name another column")
    if found["dimension"] == dimension and same_encoder:
        return
    raise UserError(
        f"column {column!r} holds {found['dimension']}-dimensional embeddings of encoder {found['encoder']!r}, not "
        f"{dimension}-dimensional ones of {encoder!r}{_differences(_settings(found), settings or {})}: encoders can't be "
        f"mixed; name another column, or delete this one with {_delete(catalog, column)}"
    )


def column_settings(catalog: Catalog, column: str, encoder: str | None = None) -> dict[str, Any]:
    """Return the settings that a column was made with; empty if it was imported, belongs to another kind of encoder, or has not started.

    A column has started when it has a part, or when its record names this encoder.
    """
    path = _record(catalog, column)
    if not path.exists():
        return {}
    found = read_record(path)
    same_kind = encoder is None or found["encoder"].partition(":")[0] == encoder.partition(":")[0]
    started = found["encoder"] == encoder or (same_kind and any(part_markers(path.parent)))
    return _settings(found) if started else {}


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a column's record; empty for an imported column."""
    return dict(record.get("settings", {}))


def column_record(catalog: Catalog, column: str) -> dict[str, Any]:
    """Return "dimension", "encoder" (as it was spelt), "modality" and "settings" of a column; settings are empty where it was imported."""
    record = read_record(_record(catalog, column))
    return {**{name: record[name] for name in ("dimension", "encoder", "modality")}, "settings": _settings(record)}


def check_one_encoder(catalog: Catalog, columns: Sequence[str], purpose: str) -> None:
    """Refuse images and texts that different models embedded. Imported columns pass: their model is unknown.

    `columns`: that of the images, and that of the texts. `purpose`: what needs both, for the message.

    Raises:
        UserError: so it is.
    """
    image, text = (column_settings(catalog, column) for column in columns)
    if names := other_models(image, text):
        said = [repr(read_record(_record(catalog, column))["encoder"]) for column in columns]
        raise UserError(
            f"{purpose} needs both columns of one model, and images were embedded by {said[0]}, texts by {said[1]} (another "
            f"{' and other '.join(names)}): delete one with {_delete(catalog, columns[1])}, and rebuild it"
        )


def other_models(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return which settings of two columns name different models: "model", "weights"; none where a model is not known."""
    return [name for name in ("model", "weights") if first and second and first.get(name) != second.get(name)]


def _delete(catalog: Catalog, column: str) -> str:
    """Return the command that deletes a column."""
    return command_line("delete", catalog.folder, f"{layout.EMBEDDINGS}/{column}")


def _differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Return the differences between two encoders of a kind, for people."""
    names = [name for name in sorted({*found, *asked}) if found and asked and found.get(name) != asked.get(name)]
    names = ["model"] if "model" in names else names  # all else follows from it
    said = [f"{name} {found.get(name)}, not {asked.get(name)}" for name in names]
    return f" ({'; '.join(said)})" if said else ""


def part_marker(catalog: Catalog, column: str, part: Part) -> Path:
    """The done-marker of one part of a column."""
    return layout.marker(catalog.embedding_path(column, part))


def part_markers(folder: Path) -> list[Path]:
    """Return the done-markers of a column's parts, sorted."""
    return sorted(folder.glob(f"{layout.PART}*{layout.RECORD}"))


def column_records(catalog: Catalog) -> list[Path]:
    """Return the records of all columns, sorted; each is in the folder of its column."""
    return sorted((catalog.folder / layout.EMBEDDINGS).glob(f"*/{layout.COLUMN}"))


def column_modality(catalog: Catalog, column: str, given: str | None = None) -> str:
    """Return of what a column is made: "image" or "text".

    `column`: its name; it need not exist. `given`: the modality, where the user gave one.

    Raises:
        UserError: it is none of these, or not the one that the column has or is named by; or a new column of another name lacks one.
    """
    if given is not None and given not in MODALITIES:
        raise UserError(f"`of` {given!r}: use {' or '.join(MODALITIES)}")
    record = _record(catalog, check_name(column))
    known = column if column in MODALITIES else str(read_record(record)["modality"]) if record.exists() else None
    if given is not None and known is not None and given != known:
        raise ConflictError(f"`of` {given}: column {column!r} is of {known}; name another column")
    if (modality := given or known) is None:
        raise UserError(f"`column` {column!r} is new: say with `of` {' or '.join(MODALITIES)} what it is made of")
    return modality


def check_column(catalog: Catalog, column: str, modality: str | None = None) -> str:
    """Return the name of a column; a UserError says that there is none, or that it is not of this modality."""
    known = {*MODALITIES, *column_names(catalog)}  # these two are named where embeddings are missing
    if column not in known:
        raise UserError(f"unknown column {column!r}: {did_you_mean(column, sorted(known))}")
    if modality is not None and (found := column_modality(catalog, column)) != modality:
        raise UserError(f"column {column!r} is of {found}, not of {modality}: name another one")
    return column


def embeddings_of(catalog: Catalog, column: str, snapshot: Snapshot | None = None) -> RowColumn:
    """Return an embedding column over the rows of a snapshot, by default the newest: float16 [N, d]."""
    path, width = partial(catalog.embedding_path, column), column_record(catalog, column)["dimension"]
    return RowColumn(path, catalog.parts(snapshot), np.float16, (width,))


def column_names(catalog: Catalog) -> list[str]:
    """Return the names of all columns, unfinished ones too, sorted."""
    return [path.parent.name for path in column_records(catalog)]


def _record(catalog: Catalog, column: str) -> Path:
    return catalog.embedding_folder(column) / layout.COLUMN


def column_dimension(catalog: Catalog, column: str) -> int | None:
    """The width d of a column; None if it has no part yet."""
    started = any(part_markers(catalog.embedding_folder(column)))
    return int(read_record(_record(catalog, column))["dimension"]) if started else None


def embedding_inputs(catalog: Catalog, column: str, snapshot: Snapshot) -> dict[str, str]:
    """Return name and hash of a column and its snapshot, for the inputs of an artifact."""
    return {"snapshot": snapshot.id, "embeddings": catalog.embedding_id(column, snapshot)}


def present(rows: npt.NDArray[np.float16]) -> npt.NDArray[np.bool_]:
    """Return which rows [n, d] are embeddings, and not all zeros: bool [n]."""
    there: npt.NDArray[np.bool_] = rows[:, 0] != 0  # nearly all are; NumPy is slow at float16
    there[~there] = rows[~there].any(axis=1)
    return there


def write_part(
    catalog: Catalog,
    column: str,
    part: Part,
    dimension: int,
    chunks: Iterable[npt.NDArray[np.float16]],
    **notes: Any,  # noqa: ANN401  (JSON values)
) -> int:
    """Writes one part of a column, its marker last; returns how many rows have an embedding.

    `column`: "image" or "text". `chunks`: consecutive rows, float16 [n, d], unit norm or all zeros, `part.rows` in all; taken to the end
    before the marker is written.
    """
    path = catalog.embedding_path(column, part)
    embedded = 0
    with writing(path) as stream:
        # Not mapped: on a full disk, a mapped file ends the process without a word.
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(stream, {**header, "shape": (part.rows, dimension)})
        start = 0
        for chunk in chunks:
            stream.write(np.ascontiguousarray(chunk, np.float16).data)
            start += len(chunk)
            embedded += int(present(chunk).sum())
        if start != part.rows:
            raise ValueError(f"{start} rows for a part of {part.rows}")
        digest, marker = stream.state.hexdigest(), part_marker(catalog, column, part)
        if marker.exists():  # where this process ends before the new marker is there, the old one knows both files
            write_record(marker, {**read_record(marker), "replaced_by": digest})
    write_record(marker, {"rows": part.rows, "embedded": embedded, "digest": digest, **notes})
    return embedded
