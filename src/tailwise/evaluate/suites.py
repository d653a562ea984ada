"""Suites of evaluation sets: their members, the official metric of each, and macro averages. `suites.csv` holds them as data.

DataComp's 38 sets without WinoGAViL, which has a form of its own (arXiv 2304.14108, and `tasklist.yml` of its code); the 19 of VTAB (arXiv
1910.04867); ImageNet's six distribution shifts as in DataComp. A set has one official metric, DataComp's, in all suites.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailwise.errors import NotFoundError, UserError
from tailwise.evaluate.images import TarShard
from tailwise.evaluate.sets import ImageSet, find_set
from tailwise.text import did_you_mean

if TYPE_CHECKING:
    from tailwise.evaluate.run import Evaluation

TABLE = Path(__file__).with_name("suites.csv")
METRICS: Mapping[str, str] = {
    "top1": "top-1",
    "mean_per_class": "mean per class",
    "mean_recall@1": "mean recall at 1",
    "macro_f1": "macro F1",
    "worst_group_top1": "top-1 of the worst group",
    "worst_group_top5": "top-5 of the worst group",
}


@dataclass(frozen=True)
class Member:
    """One set of a suite."""

    title: str  # name for people
    name: str  # name of the published set
    publisher: str  # its owner on Hugging Face: clip-benchmark, or djghosh for those of DataComp alone
    metric: str  # name in METRICS
    ignored_group: int | None  # group that "worst_group_…" leaves out
    averages: tuple[str, ...]  # names of the macro averages that it counts in; the suite is the text before a colon

    @property
    def repository(self) -> str:
        """Name of the set on Hugging Face."""
        return f"wds_{self.name}{'_test' * (self.publisher == 'djghosh')}"

    def find(self, folder: Path) -> Path | None:
        """Return the set's folder inside `folder`, by the names that publishers and download scripts use; None if it is missing."""
        names = (f"wds_{self.name}", f"wds_{self.name}_test", self.name, self.name.removeprefix("vtab-"))
        return next((folder / name for name in names if (folder / name).is_dir()), None)

    def remedy(self, folder: Path) -> str:
        """Return the command that downloads the set."""
        source = f'{self.publisher}/{self.repository} --repo-type dataset --exclude "train/*"'
        return f"hf download {source} --local-dir {folder / f'wds_{self.name}'}"


def members() -> dict[str, list[Member]]:
    """Return the members of each suite, in the order of the table."""
    suites: dict[str, list[Member]] = {}
    with TABLE.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            group = int(row["ignored_group"]) if row["ignored_group"] else None
            averages = tuple(row["averages"].split(";"))
            member = Member(row["title"], row["name"], row["publisher"], row["metric"], group, averages)
            for suite in dict.fromkeys(name.partition(":")[0] for name in averages):
                suites.setdefault(suite, []).append(member)
    return suites


def find_suite(suite: str, folder: Path) -> list[ImageSet]:
    """Return the sets of a suite that a folder holds; raise a UserError for an unknown suite, or if it holds none."""
    suites = members()
    if suite not in suites:
        raise UserError(f"unknown `suite` {suite!r}: {did_you_mean(suite, suites)}")
    found = [(member, place) for member in suites[suite] if (place := member.find(folder)) is not None]
    if not found:
        first = suites[suite][0]
        raise NotFoundError(
            f"{folder} holds no set of suite {suite}, such as {first.title} in wds_{first.name}: {first.remedy(folder)}"
        )
    return [_as_member(find_set(str(place)), member) for member, place in found]


def _as_member(images: ImageSet, member: Member) -> ImageSet:
    shards = images.shards
    if member.metric.startswith("worst_group"):
        shards = tuple(replace(item, targets=("cls", "npy")) if isinstance(item, TarShard) else item for item in shards)
    return replace(images, name=member.title, shards=shards, metric=member.metric, ignored_group=member.ignored_group)


def as_table(suite: str, folder: Path, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the rows of a suite's table, and its macro averages, as JSON values.

    A row has the figure of the official metric, or the command that gets the set. An average is None until all its sets are there.
    """
    known = {item.name: item.summary["official"] for item in evaluations}
    listed = members()[suite]
    rows = [
        {"set": member.title, "metric": member.metric, **known[member.title], "missing": None}
        if member.title in known
        else {"set": member.title, "metric": member.metric, **_NONE, "missing": member.remedy(folder)}
        for member in listed
    ]
    return {"suite": suite, "sets": rows, "averages": dict(_averages(suite, listed, known))}


_NONE: Mapping[str, None] = {"value": None, "low": None, "high": None}


def _averages(
    suite: str, listed: Sequence[Member], known: Mapping[str, Mapping[str, float]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in dict.fromkeys(name for member in listed for name in member.averages if name.partition(":")[0] == suite):
        titles = [member.title for member in listed if name in member.averages]
        there = [known[title]["value"] for title in titles if title in known]
        value = sum(there) / len(there) if len(there) == len(titles) else None
        yield name.removeprefix(f"{suite}: "), {"sets": len(titles), "found": len(there), "value": value}
