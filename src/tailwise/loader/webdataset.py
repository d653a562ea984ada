"""A stage for the user's webdataset pipelines: it passes the samples that the plan's epoch draws."""

from __future__ import annotations

import logging
import os
import posixpath
import shlex
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import get_worker_info

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import read_record
from tailwise.catalog.removals import Removals
from tailwise.catalog.schema import FINGERPRINT
from tailwise.errors import UserError
from tailwise.loader.captions import CaptionMix
from tailwise.plan.plan import Plan
from tailwise.requests import caption_weights
from tailwise.shards.fingerprint import EVERY, SOME, ChangedShardError, comparable_shards, compare_shard
from tailwise.storage.remote import is_remote

logger = logging.getLogger(__name__)
KEPT_SHARDS = 16  # several, for shuffled samples
KEPT_URLS = 1024
DOUBTFUL = 100  # samples without a known key, after which a shard that was found by its base name alone is doubted
UNKNOWN = ("error", "drop")
_COUNTERS = 1024  # one per worker, so that none is written by two

Sample = dict[str, Any]
# Copies; caption, None for the sample's own; and its name, if there are several.
Drawn = tuple[int, str | None, str | None]


class Select:
    """A stage of a webdataset pipeline that passes the samples of a plan's epoch; put it after `tarfile_to_samples`.

    Of samples (dicts with `__url__` and `__key__`) it yields those of the epoch, each as often as it is drawn.
    A sample that is drawn more than once is copied (the dict, not its values), with the number of the copy in `__copy__`. The result
    depends on shard, key and epoch alone. Keys of the latest few shards are in memory. It may be pickled, for workers that are spawned;
    the epoch is shared with all workers.

    Args:
        plan: a plan.
        epoch: the first epoch, 0, 1, …; see `set_epoch`.
        unknown: a sample of a shard that the plan does not know is an "error", or "drop" it.
        captions: joined captions and their weights, see `Loader`; with the plan's seed. The one that is drawn replaces "txt" of the
            sample, UTF-8, and its name is in `__caption__`.
    """

    def __init__(
        self, plan: Plan, epoch: int = 0, unknown: str = "error", captions: Mapping[str, float] | None = None
    ) -> None:
        if unknown not in UNKNOWN:
            raise UserError(f"unknown={unknown!r}: must be one of {', '.join(UNKNOWN)}")
        self._plan, self._unknown, self._captions = plan, unknown, caption_weights(captions)
        CaptionMix(plan.catalog, self._captions, 0)  # refuses unknown ones
        # A tensor in shared memory reaches workers however they are started; a multiprocessing.Value is bound to one way.
        self._shared = torch.zeros(1 + _COUNTERS, dtype=torch.int64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]
        self._lookup: _Lookup | None = None
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of all later samples, in all workers."""
        self._plan.drawn_epoch(epoch)
        self._shared[0] = epoch

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return int(self._shared[0])

    @property
    def unlisted(self) -> int:
        """Samples dropped so far, by all workers, because they are not in the catalog: rejected at import, or of an unknown shard."""
        return int(self._shared[1:].sum())

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield the samples that pass; a UserError for one without `__url__` or `__key__`, or of an unknown shard."""
        shared = self._shared.numpy()  # the same memory, read without torch's overhead
        worker = get_worker_info()
        counter = 1 + (0 if worker is None else 1 + worker.id) % _COUNTERS
        lookup = self._opened()
        for sample in samples:
            try:
                url, key = sample["__url__"], sample["__key__"]
            except (KeyError, TypeError) as error:
                raise UserError(
                    "a sample has no __url__ and __key__: put select(plan) right behind tarfile_to_samples"
                ) from error
            found = lookup.copies(url, key, int(shared[0]), self._unknown)
            if found is None:
                shared[counter] += 1
                continue
            copies, caption, name = found
            more: Sample = {} if name is None else {"__caption__": name}
            more |= {} if caption is None else {"txt": caption.encode()}
            if copies == 1:
                yield {**sample, **more} if more else sample
            else:
                for number in range(copies):
                    yield {**sample, **more, "__copy__": number}

    def _opened(self) -> _Lookup:
        """Return this process's own view of the plan, without locks and memory maps of another process."""
        if self._lookup is None or self._lookup.process != os.getpid():
            self._lookup = _Lookup(Plan(Catalog.open(self._plan.catalog.folder), self._plan.name), self._captions)
        return self._lookup

    def __getstate__(self) -> dict[str, Any]:
        place = self._plan.catalog.folder, self._plan.name
        return {**self.__dict__, "_lookup": None, "_plan": place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        folder, name = state.pop("_plan")
        self.__dict__.update(state, _plan=Plan(Catalog.open(folder), name))


select = Select


class _Lookup:
    """Copies by URL and key, for one process."""

    def __init__(self, plan: Plan, captions: Mapping[str, float]) -> None:
        self.mix = CaptionMix(plan.catalog, captions, plan.config["seed"]) if captions else None
        self.process = os.getpid()
        self.plan, self.removals = plan, Removals.of(plan.catalog, plan.snapshot)
        shards = comparable_shards(plan.catalog, plan.snapshot)
        self.paths: list[str] = shards.column("path").to_pylist()
        self.parts: list[int] = shards.column("part").to_pylist()
        self.by_path = {spelling: shard for shard, path in enumerate(self.paths) for spelling in _spellings(path)}
        self.by_name: dict[str, list[int]] = {}
        for shard, path in enumerate(self.paths):
            self.by_name.setdefault(posixpath.basename(path), []).append(shard)
        self.fingerprints: list[str | None] = shards.column(FINGERPRINT).to_pylist()
        self.compared: set[int] = set()
        self.doubts: dict[int, int] = {}  # samples without a known key, of shards found by their base name alone
        self.find = lru_cache(KEPT_URLS)(self._find)
        self.is_rejected = lru_cache(KEPT_URLS)(self._is_rejected)
        self.shard_copies = lru_cache(KEPT_SHARDS)(self._shard_copies)

    def copies(self, url: str, key: str, epoch: int, unknown: str) -> Drawn | None:
        """Return what an epoch draws of one sample; None if it is not in the catalog."""
        shard = self.find(url)
        if shard is None:
            if unknown == "drop" or self.is_rejected(url):
                return None
            raise UserError(self._why_unknown(url))
        copies = self.shard_copies(shard, epoch).get(key)
        if shard in self.doubts:
            self._doubt(shard, url, copies is not None)
        return copies

    def _find(self, url: str) -> int | None:
        candidates = _readable(url)
        for candidate in candidates:
            for spelling in _spellings(candidate):
                if spelling in self.by_path:
                    self._compare(self.by_path[spelling], candidate)
                    return self.by_path[spelling]
        for candidate in candidates:
            named = self.by_name.get(posixpath.basename(candidate), [])
            if len(named) == 1:
                self.doubts.setdefault(named[0], 0)
                return named[0]
        return None

    def _compare(self, shard: int, path: str) -> None:
        """Raise a UserError for a shard that has changed since the import; each is compared once."""
        if shard not in self.compared:
            try:
                compare_shard(path, self.fingerprints[shard], SOME if is_remote(path) else EVERY)
            except ChangedShardError as error:
                raise UserError(f"{error}: restore it") from error
            except (OSError, UserError):
                pass  # only the pipeline can read it, by a command of its own
            self.compared.add(shard)

    def _is_rejected(self, url: str) -> bool:
        """Return whether an import rejected all samples of this tar: it is known then, although it is not a shard."""
        spellings = [spelling for candidate in _readable(url) for spelling in _spellings(candidate)]
        of_samples = pc.field("file").isin(spellings) & pc.field("key").is_valid()
        listed = self.plan.catalog.rejected(["file"], of_samples, f"{layout.IMPORT_LOG}-")
        rejected = set() if listed is None else set(listed.column("file").to_pylist())
        return bool(rejected) and not rejected <= self._imported_paths

    @cached_property
    def _imported_paths(self) -> set[str]:
        """Paths of the tars with samples, at the time of the import."""
        markers = self.plan.catalog.samples_markers()
        return {shard["path"] for marker in markers for shard in read_record(marker)["shards"]}

    def _why_unknown(self, url: str) -> str:
        catalog, name = self.plan.catalog, self.plan.name
        same = [
            self.paths[shard] for item in _readable(url) for shard in self.by_name.get(posixpath.basename(item), [])
        ]
        if same:
            return (
                f"{url}: {len(same):,} shards of plan {name!r} have this base name ({same[0]}, {same[1]}, …): if the shards moved, "
                f"`tailwise relocate {catalog.folder} OLD NEW`; or select(plan, unknown='drop')"
            )
        return (
            f"{url} is none of the {len(self.paths):,} shards of plan {name!r} (the first is {self.paths[0]}): if the shards moved, "
            f"`tailwise relocate {catalog.folder} OLD NEW`; if it is new, `tailwise import SHARDS {catalog.folder}` and a new plan; "
            "or select(plan, unknown='drop')"
        )

    def _doubt(self, shard: int, url: str, listed: bool) -> None:
        """Warn if a shard that was found by its base name alone seems to be another one."""
        self.doubts[shard] += 1
        if listed:
            del self.doubts[shard]
        elif self.doubts[shard] == DOUBTFUL:
            logger.warning(
                "%s: the first %d samples are all unknown to the shard of the same name, %s: are they the same shard?",
                *(url, DOUBTFUL, self.paths[shard]),
            )

    def _shard_copies(self, shard: int, epoch: int) -> dict[str, Drawn]:
        mine = self.plan.rows_of(shard)
        first_of_part = self.plan.rows_of(self.parts.index(self.parts[shard])).start
        rows = np.arange(mine.start - first_of_part, mine.stop - first_of_part)
        keys = self.plan.catalog.samples_at(self.parts[shard], rows, ["key"]).column("key").to_pylist()
        copies = self.plan.draw(epoch, mine) * self.removals.keeps(mine)
        chosen: list[tuple[str | None, str | None]] = [(None, None)] * len(keys)
        if self.mix is not None:
            found = self.mix.of(np.arange(mine.start, mine.stop), np.full(len(keys), epoch, np.int32))
            chosen = [
                (text, name) if count else (None, None)
                for text, name, count in zip(found.texts, found.names, copies.tolist(), strict=True)
            ]
        pairs = zip(copies.tolist(), chosen, strict=True)
        return dict(zip(keys, ((count, *caption) for count, caption in pairs), strict=True))


def _readable(url: str) -> list[str]:
    """Return the paths that a webdataset URL may read: itself, or all words of its command."""
    if not url.startswith("pipe:"):
        return [url]
    try:
        return shlex.split(url.removeprefix("pipe:"))
    except ValueError:  # unbalanced quotes
        return [url]


def _spellings(path: str) -> Iterator[str]:
    """Yield the forms of a path to compare: as given; absolute, if it is local."""
    yield path
    if path.startswith("file:"):
        path = unquote(urlsplit(path).path)
    if "://" not in path:
        yield os.path.abspath(path)  # noqa: PTH100  (Path.absolute leaves "..")
