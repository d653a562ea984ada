"""Delete and rename artifacts and embedding columns of a catalog, with an eye on what was made from them.

Artifacts know those that they were made from by name and by hash. So an artifact from which others were made keeps its name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailwise.catalog import layout
from tailwise.catalog.catalog import SERIES, Catalog
from tailwise.catalog.embeddings import JOINT, MODALITIES, column_records, part_markers
from tailwise.catalog.files import read_record
from tailwise.catalog.kinds import CAPTIONS, CLUSTERING, CONCEPTS, KINDS, NAMED_SCORE, check_name, named_inputs
from tailwise.errors import ConflictError, NotFoundError, UnsupportedError, UserError
from tailwise.steps.scoring.scores import COLUMN, SCORES
from tailwise.storage.local import flush, locked, put_if_absent, remove_folder
from tailwise.storage.store_path import stored
from tailwise.text import command_line, did_you_mean

_FOLDERS = {kind.folder: kind for kind in KINDS}
_NAMES = (*_FOLDERS, layout.EMBEDDINGS)
_LOGS = {  # of what was left out: their names, by folder
    layout.EMBEDDINGS: (f"{layout.EMBED_LOG}-{{}}-{layout.PART}??????", f"{{}}-{layout.JOIN_LOG}-*"),
    CAPTIONS.folder: (f"{layout.CAPTIONS}-{{}}",),
    CONCEPTS.folder: (f"{layout.CONCEPTS}-{{}}",),
    CLUSTERING.folder: (f"{layout.CLUSTER_IDS_LOG}-{{}}",),
}


@dataclass(frozen=True)
class Deleted:
    """An artifact or an embedding column that was deleted, or would be."""

    name: str  # its folder in the catalog, such as plans/epochs
    size_bytes: int  # of all its files


@dataclass
class _Item:
    """An artifact or an embedding column, finished or not."""

    catalog: Path  # its folder
    name: str  # KIND/NAME
    # manifest, pending records, or record of the column; none: an interrupted deletion has left the rest
    records: list[Path]
    uses: set[str] = field(default_factory=set)  # names of those that it was made from

    @property
    def folder(self) -> Path:
        return self.catalog / self.name

    @property
    def is_column(self) -> bool:
        return self.name.startswith(f"{layout.EMBEDDINGS}/")

    @property
    def is_cache(self) -> bool:
        """True if it is made again when it is needed, and nothing can use it without those that it was made from."""
        return not self.is_column and not _FOLDERS[self.folder.parent.name].made_by

    @property
    def record(self) -> Path:
        """Its record when it is finished; of a column, when it was started."""
        return self.folder / (layout.COLUMN if self.is_column else layout.MANIFEST)

    @property
    def lock(self) -> Path:
        """The lock that its writers hold."""
        return self.catalog / layout.LOCK if self.is_column else layout.lock(self.folder)

    @property
    def folders(self) -> list[Path]:
        """All folders with files of it."""
        return list(dict.fromkeys([self.folder, self.folder if self.is_column else layout.unfinished(self.folder)]))

    def logs(self) -> Iterator[Path]:
        """Yield the lists of what was left out when it was made."""
        for pattern in _LOGS.get(self.folder.parent.name, ()):
            yield from (self.catalog / layout.REJECTED).glob(f"{pattern.format(self.folder.name)}{layout.TABLE}")

    def delete(self) -> None:
        """Remove its files, those first without which it is unfinished."""
        if self.is_column:
            for marker in reversed(part_markers(self.folder)):
                marker.unlink(missing_ok=True)
            (self.folder / layout.JOINS).unlink(missing_ok=True)
            remove_folder(self.folder / layout.UNFINISHED)
        else:
            self.record.unlink(missing_ok=True)
        if self.folder.is_dir():
            flush(self.folder)
        for path in (*self.logs(), *self.folders):
            path.unlink() if path.suffix == layout.TABLE else remove_folder(path)


def delete(
    catalog: Catalog, names: Sequence[str], *, with_dependants: bool = False, dry_run: bool = False
) -> list[Deleted]:
    """Delete artifacts and embedding columns; return what was deleted, in order: what was made from others before these.

    Scores, hashes, comparisons and matches go with what they were made from. An interrupted call is to be repeated.

    `names`: folder and name of each, such as plans/epochs, clusters/main or embeddings/text. `with_dependants`: delete all that was made
    from them, too.

    Raises:
        NotFoundError: there is no such artifact.
        ConflictError: others were made from it, or another process is writing one of them.
        UserError: it is no name of an artifact.
    """
    items = _closure(catalog, names, with_dependants=with_dependants)
    found = [Deleted(item.name, sum(map(_size, item.folders))) for item in items]
    if dry_run:
        return found
    with _locked(items):
        now = _closure(catalog, names, with_dependants=with_dependants)
        if [item.name for item in now] != [item.name for item in items]:
            raise ConflictError(f"another process has written {catalog.folder} at this moment: repeat this command")
        for item in items:
            item.delete()
    return found


def rename(catalog: Catalog, name: str, new: str) -> str:
    """Give an artifact or an embedding column, from which nothing was made, another name; return its new folder in the catalog.

    An interrupted call is to be repeated. In an object store, the files are copied by the server.

    `name`: folder and name, such as plans/epochs. `new`: name in the same folder.

    Raises:
        NotFoundError: there is no such artifact, or it is unfinished.
        ConflictError: others were made from it, the new name is taken, or another process is writing one of both.
    """
    items = _items(catalog)
    item = _find(catalog, items, name)
    other = _Item(catalog.folder, f"{item.folder.parent.name}/{check_name(new)}", [])
    if item.is_cache:
        raise UnsupportedError(f"{name} has a hash as its name, by which it is found: it can't be renamed")
    if not item.record.exists():
        raise NotFoundError(f"{name} is unfinished: finish or delete it")
    if users := [user.name for user in items.values() if name in user.uses]:
        raise ConflictError(
            f"{name} keeps its name, by which others know it that were made from it ({', '.join(users)}): delete these first"
        )
    modality = read_record(item.record).get("modality")
    if item.is_column and new in MODALITIES and modality != new:
        raise ConflictError(f"{name} is of {modality}: a column of the name {new!r} has to be of {new}")
    if other.folder == item.folder:
        return name
    with _locked([item, other]):
        if other.record.exists() and not _same(item, other):
            raise ConflictError(f"{other.name} exists: give another name, or delete it")
        if any(folder.exists() for folder in other.folders if folder != other.folder):
            raise ConflictError(f"{other.name} is unfinished: give another name, or delete it")
        if stored(item.folder) is None:
            remove_folder(other.folder)  # without a record, it is what a deletion has left
            item.folder.rename(other.folder)
            flush(item.folder.parent)
        else:
            _copy(item, other)
            item.delete()
    return other.name


def _same(item: _Item, other: _Item) -> bool:
    """Return True if an interrupted renaming in an object store has finished the other: it has all records of the first."""
    if stored(item.folder) is None:
        return False
    before, after = (
        {path.name: path.read_bytes() for path in of.folder.glob(f"*{layout.RECORD}")} for of in (item, other)
    )
    return before.items() <= after.items()


def _copy(item: _Item, other: _Item) -> None:
    """Copy the files of an artifact in an object store; its record is the last."""
    source, target = stored(item.folder), stored(other.folder)
    if source is None or target is None or other.record.exists():
        return
    target.store.delete_folder(target.key)
    for key in source.store.keys(f"{source.key}/"):
        if key != f"{source.key}/{item.record.name}":
            source.store.copy(key, f"{target.key}{key.removeprefix(source.key)}")
    if not put_if_absent(other.record, item.record.read_bytes()):
        raise ConflictError(f"another process has made {other.name} at this moment: give another name")


@contextmanager
def _locked(items: Sequence[_Item]) -> Iterator[None]:
    """Hold the locks of all writers of some items."""
    with ExitStack() as held:
        for path, name in {item.lock: item.name for item in items}.items():
            held.enter_context(locked(path, name))
        yield


def _closure(catalog: Catalog, names: Sequence[str], *, with_dependants: bool) -> list[_Item]:
    """Return what goes with some items, and these, in the order of deletion."""
    items = _items(catalog)
    wanted, ordered, users = dict.fromkeys(names), dict[str, _Item](), dict[str, list[str]]()
    for item in items.values():
        for used in item.uses:
            users.setdefault(used, []).append(item.name)

    def visit(item: _Item) -> None:
        for name in users.get(item.name, ()):
            if name not in ordered:
                visit(items[name])
        ordered[item.name] = item

    for name in wanted:
        item = _find(catalog, items, name)
        if name not in ordered:
            visit(item)
    ordered |= {item.name: item for item in items.values() if not item.records}
    others = [item.name for item in ordered.values() if item.name not in wanted and item.records and not item.is_cache]
    if others and not with_dependants:
        raise ConflictError(
            f"{', '.join(others)} {'were' if len(others) > 1 else 'was'} made from {', '.join(wanted)}: delete "
            f"{'these' if len(others) > 1 else 'it'} too (`with_dependants`), or keep both"
        )
    return list(ordered.values())


def _find(catalog: Catalog, items: Mapping[str, _Item], name: str) -> _Item:
    """Return an item by name; also one that an interrupted deletion has left."""
    kind, _, own = name.partition("/")
    if kind in {*SERIES, layout.SAMPLES, layout.SHARDS, layout.LOCATIONS}:
        instead = command_line("remove", catalog.folder, keys="…")
        raise UnsupportedError(
            f"{kind} can't be deleted or renamed, as all else refers to rows: remove samples by {instead}"
        )
    if kind not in _NAMES or not own:
        raise UserError(f"{name!r} names no artifact: give KIND/NAME, where KIND is one of {', '.join(_NAMES)}")
    check_name(own)
    if name not in items:
        there = [other for other in items if other.startswith(f"{kind}/")]
        raise NotFoundError(f"there is no {name}: {did_you_mean(name, there) if there else f'{kind} is empty'}")
    return items[name]


def dependencies(catalog: Catalog) -> dict[str, set[str]]:
    """Return the names of all artifacts and embedding columns, each with the names of those that it was made from."""
    return {name: item.uses for name, item in _items(catalog).items()}


def _items(catalog: Catalog) -> dict[str, _Item]:
    """Return all artifacts and embedding columns by name, finished and unfinished ones."""
    items = dict[str, _Item]()

    def item(name: str) -> _Item:
        return items.setdefault(name, _Item(catalog.folder, name, []))

    def add(name: str, record: Path) -> dict[str, Any]:
        item(name).records.append(record)
        try:
            return read_record(record)
        except UserError:  # a damaged one may be deleted
            return {}

    for path in column_records(catalog):
        name = f"{layout.EMBEDDINGS}/{path.parent.name}"
        column = add(name, path)
        settings = column.get("settings", {})
        if "captions" in settings:
            items[name].uses.add(f"{CAPTIONS.folder}/{settings['captions']['name']}")
        if column.get("modality") == JOINT:
            items[name].uses |= {f"{layout.EMBEDDINGS}/{used}" for used in settings}
    for kind in KINDS:
        finished = [(path.parent.name, path) for path in kind.manifests(catalog.folder)]
        for own, path in (*finished, *kind.unfinished(catalog.folder)):
            record = add(f"{kind.folder}/{own}", path)
            item(f"{kind.folder}/{own}").uses.update(_uses(record.get("identity", record)))
    for folder in _NAMES:
        for path in (catalog.folder / folder).glob("[!.]*"):
            item(f"{folder}/{path.name}")
    return items


def _uses(identity: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the artifacts and columns that an artifact was made from."""
    if not identity:
        return
    for kind, name, _ in named_inputs(identity):
        yield f"{kind.folder}/{name}"
    config, inputs = identity["config"], identity["inputs"]
    if "embeddings" in inputs:
        yield f"{layout.EMBEDDINGS}/{config['column']}"
    score = config.get("score") or {}
    if isinstance(score, str):  # of a comparison, whose input is the hash of the values
        yield f"{NAMED_SCORE.folder}/{score}"
        yield from _used_by_score({}, {*SCORES.get(score, COLUMN).inputs})
        return
    yield from _used_by_score(score, {label.removeprefix("score's ") for label in inputs})
    for part in score.get("of", ()):  # of a mix
        end = f" of {part['name']}"
        labels = [label.removeprefix("score's ") for label in inputs if label.endswith(end)]
        yield from _used_by_score(part, {label.removesuffix(end) for label in labels})


def _used_by_score(score: Mapping[str, Any], inputs: Collection[str]) -> Iterator[str]:
    """Yield the names of the artifacts and columns that a score was made from, by its settings and the kinds of its inputs."""
    for modality in MODALITIES:
        if f"{modality} embeddings" in inputs:
            yield f"{layout.EMBEDDINGS}/{score.get(modality, modality)}"
    for kind, option in ((CAPTIONS, "captions"), (CLUSTERING, "clustering")):
        if option in inputs and option in score:
            yield f"{kind.folder}/{score[option]}"


def _size(folder: Path) -> int:
    """Return the bytes of all files below a folder; 0 where there is none."""
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size if path.is_file() else _size(path) for path in folder.iterdir())
