"""Artifacts: made once, in a folder named by a digest of what they are made from, which gets the artifact's name when it is finished."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.columns import PlainColumn, RowColumn
from tailwise.catalog.files import digest, known_digest, read_record, record_bytes
from tailwise.catalog.layout import MANIFEST, PENDING, lock, plain_file, unfinished
from tailwise.errors import ConflictError, NotFoundError, PartDoneError, UserError
from tailwise.extras import versions
from tailwise.storage.local import (
    TEMPORARY_SUFFIX,
    flush,
    in_part,
    locked,
    put_if_absent,
    remove_folder,
    remove_temporary_files,
)
from tailwise.storage.store_path import is_stored
from tailwise.text import command_line, enumerated, nearest

logger = logging.getLogger(__name__)
REMOVALS = "removals"  # the input that stands for the samples removed so far
DECIDING = ("numpy", "torch", "numba", "pyarrow", "ahocorasick-rs")
FORMAT = 1  # raised when the same configuration would give other content


class Artifact:
    """One folder of a catalog, made by one stage from a configuration and inputs, inside a `with` block.

    Until it is finished, its name is locked, and its files are in a folder named by a digest of configuration and inputs: a rerun with the
    same goes on with them, and no writer with others writes there. `finish` writes `manifest.json`, and gives the folder its name:
    from then on, nothing in it is changed. Of several writers that no lock keeps apart, as on two machines, one gets the name, and
    the others are refused.

    Attributes:
        place: path of the finished artifact.
        folder: of the files; see `finished_folder` once the artifact is finished.
        done: True if the artifact is finished.
    """

    def __init__(
        self,
        place: Path,
        kind: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        derived: Mapping[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Names the artifact.

        Args:
            place: path of the finished artifact.
            kind: what it is, e.g. "clusters".
            config: all that decides its content, as JSON values.
            inputs: name and hash of each thing it is made from. Where only REMOVALS among them has changed, what is finished is taken
                as it is.
            derived: what follows from both, as JSON values.
            files: paths of files among the inputs, for people, by option: another path of the same content makes no difference.
        """
        self.identity: dict[str, Any] = {
            "kind": kind,
            "format": FORMAT,
            "config": dict(config),
            "inputs": dict(inputs),
        }
        if derived:
            self.identity["derived"] = dict(derived)
        if files:
            self.identity["files"] = dict(files)
        self.place = place
        self.folder = self._finished() or unfinished(place) / digest(_deciding(self.identity))
        self.done = False
        self._held = ExitStack()

    def __enter__(self) -> Artifact:
        """Opens or begins it.

        Raises:
            UserError: it exists with other settings or inputs, finished or not, or another process is making it.
        """
        if not self._taken:
            self._held.enter_context(locked(lock(self.place), str(self.place)))
        try:
            if self._taken:
                self._finished_in(self._finished() or self.folder)
                self._refuse_other(read_record(self.place / MANIFEST)["identity"], self.place)
            else:
                self._begin()
        except BaseException:
            self._held.close()
            raise
        return self

    def _begin(self) -> None:
        if not is_stored(self.place) and self.place.exists() and not self._taken:
            remove_folder(self.place)  # its manifest was lost: a folder gets this name with a manifest only
        for folder in {*unfinished(self.place).glob("*")} - {self.folder}:
            if {PENDING} < _names(folder):
                self._refuse_other(read_record(folder / PENDING), folder)
                remove_folder(folder)
        names = _names(self.folder)
        if MANIFEST in names:
            self._publish()
        elif PENDING not in names:
            if not in_part():  # another part may be writing there
                remove_folder(self.folder)
            put_if_absent(self.folder / PENDING, record_bytes(self.identity))
        remove_temporary_files(self.folder)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Lets go of the lock; and of the folder, where the stage refused what it was given before it made anything."""
        if kind is not None and issubclass(kind, UserError) and _names(self.folder) == {PENDING}:
            remove_folder(self.folder if is_stored(self.place) else unfinished(self.place))
        self._held.close()

    def _refuse_other(self, existing: Mapping[str, Any], folder: Path) -> None:
        """Raise a ConflictError if the artifact in a folder is another one.

        Finished artifacts stay valid after a removal of samples; unfinished ones restart.
        """
        old, new = _deciding(existing), _deciding(self.identity)
        if old["inputs"].get(REMOVALS) != new["inputs"].get(REMOVALS):
            old, new = _removals_aside(old), _removals_aside(new)
        if old != new:
            name = f"{self.place.parent.name}/{self.place.name}"
            state = "exists" if folder == self.place else "exists unfinished,"
            raise ConflictError(
                f"{self.place} {state} with other settings ({_differences(existing, self.identity)}): "
                f"choose another name, or delete it with {command_line('delete', self.place.parents[1], name)}"
            )

    def _finished(self) -> Path | None:
        if not is_stored(self.place):
            return self.place if self._taken else None
        manifest = find_manifest(self.place)
        return None if manifest is None else finished_folder(self.place, manifest["identity"])

    @property
    def _taken(self) -> bool:
        return (self.place / MANIFEST).exists()

    def path(self, name: str) -> Path:
        """The path of one file of the artifact."""
        return self.folder / name

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the manifest: identity, the hash of every file, and `summary` (figures for people); give the folder its name.

        Raises:
            ConflictError: another process has finished the artifact since this one began it.
            PartDoneError: this process is one of several parts.
        """
        if in_part():
            raise PartDoneError("no item is left for parts: run the command without `part`", 0)
        with self._race():
            self.path(PENDING).stat()  # it is missing where another process has published the folder
            paths = sorted(path for path in self.folder.iterdir() if path.is_file() and path.suffix != TEMPORARY_SUFFIX)
            files = {path.name: known_digest(path) for path in paths if path.name not in {PENDING, MANIFEST}}
            manifest = {"files": files, "summary": dict(summary), "made_by": versions(DECIDING)}
            if not put_if_absent(self.path(MANIFEST), record_bytes({"identity": self.identity, **manifest})):
                raise self._lost
        self._publish()
        logger.debug("%s is written: %d files", self.place, len(files))

    def _publish(self) -> None:
        """Give the folder its name, which no other process can then."""
        with self._race():
            if is_stored(self.place):
                if not put_if_absent(self.place / MANIFEST, self.path(MANIFEST).read_bytes()):
                    raise self._lost
            else:
                self.folder.rename(self.place)  # with the pending record: a writer that misses it finds the name taken
        flush(self.place.parent)
        self._finished_in(finished_folder(self.place, self.identity))

    def _finished_in(self, folder: Path) -> None:
        """Note that the artifact is finished; remove what other processes have left of this name."""
        self.folder, self.done = folder, True
        with suppress(OSError):  # the catalog may be read-only
            remove_temporary_files(folder)
            (folder / PENDING).unlink(missing_ok=True)
            if not is_stored(self.place):
                remove_folder(unfinished(self.place))
                return
            for other in {*self.place.iterdir()} - {folder, self.place / MANIFEST}:
                remove_folder(other)

    @contextmanager
    def _race(self) -> Iterator[None]:
        """Raise a ConflictError for an OSError, if another process has finished the artifact."""
        try:
            yield
        except OSError as error:
            if not self._taken:
                raise
            raise self._lost from error

    @property
    def _lost(self) -> ConflictError:
        return ConflictError(f"another process has finished {self.place} at this moment: repeat this command")


def _names(folder: Path) -> set[str]:
    """Return the names in a folder, without those of temporary files; none where there is no folder."""
    with suppress(FileNotFoundError):
        return {path.name for path in folder.iterdir() if path.suffix != TEMPORARY_SUFFIX}
    return set()


def _removals_aside(identity: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {name: value for name, value in identity["inputs"].items() if name != REMOVALS}
    return {**identity, "inputs": inputs, "derived": None}


def parameters(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that an artifact was made with, by the names that users give them."""
    config = dict(identity["config"])
    final = config.pop("final_options", None) or {}
    flat = {**{f"{name}_end": value for name, value in final.items()}, **identity.get("files", {})}
    if identity["kind"] == "score":  # options alone: users give no other names of scores
        score = config.pop("score")
        flat |= {name: value for part in (score, *score.get("of", ())) for name, value in part.items()}
        flat = {name: value for name, value in flat.items() if name not in {"name", "of"}}
    if identity["kind"] == "filter" and "score" in config:
        flat["by"] = config.pop("score")
    for name, value in config.items():
        flat |= value if isinstance(value, Mapping) and name not in {"score", "refill", "shares"} else {name: value}
    return flat


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return what differs: parameters with both values, else the inputs that have changed."""
    before, after = parameters(old), parameters(new)
    changes = [
        f"`{name}` {_shown(before.get(name))} → {_shown(after.get(name))}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name) and (before.get(name), after.get(name)) not in [(None, []), ([], None)]
    ]
    if old.get("format") != new["format"]:
        changes.append(f"format {old.get('format')} → {new['format']}")
    for section in ("inputs", "derived"):  # hashes, and what follows from all else: only where the request is the same
        first, second = old.get(section) or {}, new.get(section) or {}
        names = sorted(name for name in {*first, *second} - {REMOVALS} if first.get(name) != second.get(name))
        changes = changes or [f"{name} changed since" for name in names]
    changes = changes or ["samples were removed since"]
    return ", ".join(changes)


def _shown(value: object) -> str:
    if value is None or value == []:
        return "not given"
    values = value
    if isinstance(value, Mapping):
        values = list(value.values()) if "name" in value else [f"{name}={_shown(each)}" for name, each in value.items()]
    return ", ".join(map(_shown, values)) if isinstance(values, list) else str(values)


def finished_folder(place: Path, identity: Mapping[str, Any]) -> Path:
    """Return the folder with the files of a finished artifact: `place`; in an object store, a folder in it (see layout)."""
    return place / digest(_deciding(identity)) if is_stored(place) else place


def _deciding(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without the paths of files, which are for people: their content counts."""
    return {name: value for name, value in identity.items() if name != "files"}


def find_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of an artifact; None if the artifact is missing or unfinished."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return read_record(folder / MANIFEST)
    return None


def read_manifest(folder: Path, what: str, remedy: str) -> dict[str, Any]:
    """The manifest of a finished artifact.

    Raises:
        UserError: there is none; names the artifacts that are there, and the remedy.
    """
    if (manifest := find_manifest(folder)) is not None:
        return manifest
    there = sorted(path.parent.name for path in folder.parent.glob(f"*/{MANIFEST}"))
    near = nearest(folder.name, there)
    hint = f"did you mean {near!r}? Otherwise " if near else ""
    raise NotFoundError(f"no {what} named {folder.name!r} (there: {enumerated(there)}): {hint}{remedy}")


class FinishedArtifact:
    """A finished artifact."""

    catalog: Catalog  # of the artifact
    folder: Path  # of the artifact
    manifest: Mapping[str, Any]  # of the artifact

    @cached_property
    def snapshot(self) -> Snapshot:
        """Snapshot whose rows the artifact is about."""
        return self.catalog.snapshot(self.config["snapshot"])

    def row_column(self, name: str, dtype: npt.DTypeLike) -> RowColumn:
        """Return a column over the rows of the snapshot. Artifacts of older versions have one file for all parts."""
        parts = self.catalog.parts(self.snapshot)
        if len(parts) > 1 and plain_file(name, 1) not in self.manifest["files"]:
            parts = [Part(0, 0, self.snapshot.rows)]
        return RowColumn(PlainColumn(self.folder, name).path, parts, dtype)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Settings that decide the artifact, and values derived from them."""
        identity = self.manifest["identity"]
        return {**identity["config"], **identity.get("derived", {})}

    @property
    def inputs(self) -> Mapping[str, str]:
        """Name and hash of each input of the artifact."""
        return dict(self.manifest["identity"]["inputs"])

    @property
    def summary(self) -> Mapping[str, Any]:
        """Figures of the artifact, for people."""
        return dict(self.manifest["summary"])

    @property
    def id(self) -> str:
        """Hash of the artifact, for the inputs of other artifacts."""
        return artifact_id(self.manifest)


def artifact_id(manifest: Mapping[str, Any]) -> str:
    """The hash that stands for a finished artifact among the inputs of another."""
    return digest([_deciding(manifest["identity"]), manifest["files"]])
