"""Names that include the tar: `{tar path}/{key}.jpg`, or `{folder named as the tar}/{key}.jpg`.

A tar is recognized by the longest common end of its path: pools move, and the last folders of the tars mostly move with them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from tailwise.execution.keys import ABSENT, AMBIGUOUS
from tailwise.shards.grouping import split_name

_TAR = ".tar/"


class Place(NamedTuple):
    """The two parts of a name."""

    home: str  # path of the tar, with ".tar"; or of the folder, without
    key: str  # key in the tar


def in_tar(name: str) -> Place | None:
    """Return the tar and the key of `{tar path}/{key}.jpg`; None for other names."""
    at = name.rfind(_TAR)
    return None if at < 0 else Place(name[: at + 4], split_name(name[at + 5 :])[0])


def in_folder(name: str) -> Place | None:
    """Return the folder and the key of `{folder}/{key}.jpg`; None for a name without folder."""
    folder, slash, rest = name.rpartition("/")
    return Place(folder, split_name(rest)[0]) if slash else None


def dotted_key(name: str, place: Place) -> str:
    """Return the key of a name cut at the last dot, where that is longer: samples with dotted base names have such keys."""
    rest = name[len(place.home) + 1 :]
    dot = rest.rfind(".")
    return rest[:dot] if dot > len(place.key) else place.key


def homes(names: pa.Array) -> list[str]:
    """Return the distinct tars and folders at the start of some names."""
    with_folder = names.filter(pc.match_substring(names, "/").fill_null(False))
    folders = pc.unique(pc.replace_substring_regex(with_folder, pattern=r"/[^/]*$", replacement=""))
    texts = [f"{folder}/" for folder in folders.to_pylist()]
    return list({place.home: None for text in texts if (place := in_tar(text) or in_folder(text))})


def _components(home: str) -> list[str]:
    """Return the name of a tar and its folders, from the name backwards, without scheme; a folder stands for the tar of its name.

    The last is always "", so that two equal paths agree longer than a path and its end.
    """
    path = home.split("://", 1)[-1]
    name, *folders = [part for part in path.split("/") if part not in ("", ".")][::-1] or [""]
    return [name if home.endswith(".tar") else f"{name}.tar", *folders, ""]


class TarMatcher:
    """Finds the shard of a catalog for each home: first `note` all homes, then call `settle`, then `shard`."""

    def __init__(self, paths: Sequence[str], preferred: frozenset[int] | None) -> None:
        """Index the paths of the catalog's shards. `preferred` shards win where several fit equally well."""
        self._preferred = preferred
        self._by_name: defaultdict[str, list[tuple[int, list[str]]]] = defaultdict(list)
        for shard, path in enumerate(paths):
            if path.endswith(".tar"):
                parts = _components(path)
                self._by_name[parts[0]].append((shard, parts))
        self._matches: dict[str, tuple[int, int]] = {}  # home → (shard, or AMBIGUOUS; number of equal components)

    def note(self, home_paths: Iterable[str]) -> None:
        """Find the shard of each home; homes whose name no shard has are not kept."""
        for home in home_paths:
            if home not in self._matches and (match := self._match(home)):
                self._matches[home] = match

    def _match(self, home: str) -> tuple[int, int] | None:
        wanted = _components(home)
        candidates = self._by_name.get(wanted[0], [])
        if not candidates:
            return None
        agreements = [_agreement(wanted, parts) for _, parts in candidates]
        best = max(agreements)
        fitting = [shard for (shard, _), agreed in zip(candidates, agreements, strict=True) if agreed == best]
        if len(fitting) > 1 and self._preferred is not None:
            fitting = [shard for shard in fitting if shard in self._preferred]
        return (fitting[0] if len(fitting) == 1 else AMBIGUOUS), best

    def settle(self) -> None:
        """Give each shard to one home: of several, to the one that agrees longest, or to none if two agree equally."""
        claims: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)
        for home, (shard, agreed) in self._matches.items():
            if shard >= 0:
                claims[shard].append((agreed, home))
        for rivals in claims.values():
            best = max(agreed for agreed, _ in rivals)
            winners = [home for agreed, home in rivals if agreed == best]
            for agreed, home in rivals:
                if agreed < best:
                    del self._matches[home]
                elif len(winners) > 1:
                    self._matches[home] = (AMBIGUOUS, agreed)

    def shard(self, home: str) -> int:
        """Return the shard of a noted home; ABSENT, or AMBIGUOUS if several shards fit it, or several homes fit the shard."""
        return self._matches.get(home, (ABSENT, 0))[0]


def _agreement(left: list[str], right: list[str]) -> int:
    return len([*takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))])
