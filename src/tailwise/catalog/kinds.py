"""Kinds of artifacts: one table, which the catalog, `status`, `verify`, `why` and `run` read. A new kind is a new row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from tailwise.catalog import layout
from tailwise.errors import UserError
from tailwise.requests import name_of_dedup

MAX_NAME_BYTES = 200  # file systems take 255, of names with a prefix or suffix

WITHOUT = "without "  # begins the names of drop lists among the inputs of other artifacts
LISTED = "concepts "  # begins those of lists of concepts


@dataclass(frozen=True)
class Kind:
    """A kind of artifact."""

    section: str  # title in `status`
    folder: str  # of the catalog; each finished artifact is a folder in it
    columns: tuple[str, ...]  # of `status`: keys of the artifact's configuration, of what is derived, or of its files
    # commands that make an artifact which users name → the artifact's name, by the values of the command's parameters
    made_by: Mapping[str, Callable[[Mapping[str, Any]], str]] = field(default_factory=dict)
    named_by: Mapping[str, str] = field(default_factory=dict)  # commands that take an artifact by name → their option
    # of these commands, those that do not take the artifacts of all makers → the makers
    makers_for: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # names of the artifact among the inputs of another one → the key of that one's configuration that holds the name
    inputs: Mapping[str, str] = field(default_factory=dict)
    prefix: str | None = None  # before the artifact's own name among the inputs of another one

    def path(self, catalog: Path, name: str) -> Path:
        """Return the folder of one artifact; a UserError says that no artifact can have this name."""
        return catalog / self.folder / check_name(name)

    def manifests(self, catalog: Path) -> list[Path]:
        """Return the manifests of the finished artifacts, sorted by name."""
        return sorted((catalog / self.folder).glob(f"*/{layout.MANIFEST}"))

    def unfinished(self, catalog: Path) -> list[tuple[str, Path]]:
        """Return the name and the record of each artifact that is being made, or was interrupted."""
        folder = layout.unfinished(catalog / self.folder / "*")
        before, after = folder.name.split("*")
        records = (catalog / self.folder).glob(f"{folder.name}/*/{layout.PENDING}")
        return [(path.parts[-3].removeprefix(before).removesuffix(after), path) for path in records]

    def finished(self, catalog: Path) -> list[str]:
        """Return the names of the finished artifacts, sorted."""
        return [path.parent.name for path in self.manifests(catalog)]


def plain_name(name: str) -> str:
    """Return the name of a score or column as a part of the name of an artifact: columns may have any name, folders not."""
    return "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in name)


CAPTIONS = Kind(
    "captions",
    layout.CAPTIONS,
    ("by", "column"),
    made_by={"captions": itemgetter("name")},
    named_by={"embed": "captions"},
)
CONCEPTS = Kind(
    "concepts",
    layout.CONCEPTS,
    ("by", "column", "both"),
    made_by={"concepts": itemgetter("name")},
    named_by={"plan": "concepts", "group": "concepts", "concepts": "both"},
    prefix=LISTED,
)
CLUSTERING = Kind(
    "clusterings",
    layout.CLUSTERINGS,
    ("k", "merge", "column", "group_by", "extends"),
    made_by={
        "cluster": itemgetter("name"),
        "group": lambda asked: asked["name"] or asked["by"] or asked["concepts"] or "entries",
        "import": lambda asked: asked["clustering"] or "dynamics",
    },
    named_by={"plan": "clustering", "dedup": "clustering", "filter": "clustering"},
    makers_for={"dedup": ("cluster", "group"), "filter": ("cluster",)},
    inputs={"clustering": "clustering", "base": "extends"},
)
SCORE = Kind("scores", layout.SCORES, ("score",))
NAMED_SCORE = Kind(
    "named scores",
    layout.NAMED_SCORES,
    ("file", "head", "mix", "without"),
    made_by={"score": itemgetter("name")},
    prefix="named score ",
)
HASHES = Kind("hashes", layout.HASHES, ("of",))
COMPARISON = Kind("comparisons", layout.COMPARISONS, ("clustering", "order", "extends"))
MATCHES = Kind("matches", layout.MATCHES, ("ignore_case",))
DROP_LIST = Kind(
    "drop lists",
    layout.DROP_LISTS,
    ("epsilon", "exact", "against", "without"),
    made_by={
        "dedup": lambda asked: asked["name"] or name_of_dedup(asked["against"], asked["exact"]),
        "filter": lambda asked: asked["name"] or plain_name(asked["by"] or ("only" if asked["only"] else "not")),
    },
    named_by=dict.fromkeys(("plan", "dedup", "cluster", "filter", "group", "score"), "without"),
    inputs={"extends": "extends"},
    prefix=WITHOUT,
)
PLAN = Kind(
    "plans",
    layout.PLANS,
    ("method", "budget", "clustering", "dynamic", "draw"),
    made_by={"plan": itemgetter("name")},
    named_by={"plan": "of", "train": "name", "export": "name", "draw": "name", "excluded": "plan"},
    inputs={"plan": "of"},
)
# In the order of `status`.
KINDS = (CAPTIONS, CONCEPTS, CLUSTERING, SCORE, NAMED_SCORE, HASHES, COMPARISON, MATCHES, DROP_LIST, PLAN)
MADE_BY = {command: kind for kind in KINDS for command in kind.made_by}


def named_inputs(identity: Mapping[str, Any]) -> Iterator[tuple[Kind, str, str]]:
    """Yield kind, name and hash of each artifact that users name among the inputs of another one."""
    for label, value in identity["inputs"].items():
        for kind in KINDS:
            if label in kind.inputs:
                yield kind, identity["config"][kind.inputs[label]], value
            elif kind.prefix and label.startswith(kind.prefix):
                yield kind, label.removeprefix(kind.prefix), value


def check_name(name: str) -> str:
    """Return `name`; a UserError says that it has other characters than letters, digits, '.', '_', '-', begins with a dot, or is long."""
    if not name or name[0] == "." or not all(letter.isalnum() or letter in "._-" for letter in name):
        raise UserError(f"{name!r} can't name an artifact: use letters, digits, '.', '_' and '-'")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise UserError(
            f"{name[:20]}… can't name an artifact: it has {len(name.encode())} bytes, more than {MAX_NAME_BYTES}"
        )
    return name
