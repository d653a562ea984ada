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

from tailwise.execution.keys import AMBIGUOUS
from tailwise.shards.grouping import split_name
from tailwise.shards.tar import is_tar, without_packing

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


def match_tars(asked: Iterable[str], paths: Sequence[str], preferred: frozenset[int] | None) -> dict[str, int]:
    """Return the shard of each home, of the catalog's paths of shards; or AMBIGUOUS if several fit. Homes without a shard are left out.

    A `preferred` shard wins where several fit equally well. A shard that several homes fit equally well is none's.
    """
    by_name: defaultdict[str, list[tuple[int, list[str]]]] = defaultdict(list)
    for shard, path in enumerate(paths):
        if is_tar(path):
            parts = _components(without_packing(path))
            by_name[parts[0]].append((shard, parts))
    matches: dict[str, int] = {}
    claims: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)  # number of equal components, and home
    for home in asked:
        wanted = _components(home)
        if home in matches or wanted[0] not in by_name:
            continue
        candidates = by_name[wanted[0]]
        agreements = [_agreement(wanted, parts) for _, parts in candidates]
        best = max(agreements)
        fitting = [shard for (shard, _), agreed in zip(candidates, agreements, strict=True) if agreed == best]
        if len(fitting) > 1 and preferred is not None:
            fitting = [shard for shard in fitting if shard in preferred]
        matches[home] = fitting[0] if len(fitting) == 1 else AMBIGUOUS
        if len(fitting) == 1:
            claims[fitting[0]].append((best, home))
    for rivals in claims.values():  # of several homes, a shard goes to the one that agrees longest, or to none
        best = max(agreed for agreed, _ in rivals)
        winners = [home for agreed, home in rivals if agreed == best]
        for agreed, home in rivals:
            if agreed < best:
                del matches[home]
            elif len(winners) > 1:
                matches[home] = AMBIGUOUS
    return matches


def _agreement(left: list[str], right: list[str]) -> int:
    return len([*takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))])
