"""Names of all files and folders of a catalog. No other module spells such a name; this module does no I/O.

In an object store, which cannot rename, the files of an artifact are in a folder of its own folder, named by its digest, also while they
are made: `plans/p/DIGEST/…`; `plans/p/manifest.json`, which is the same as `plans/p/DIGEST/manifest.json`, is written last.

Exception: a stage names the files that only it reads, in its own scratch folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from tailwise.storage.store_path import is_stored

DIGEST = re.compile(r"[0-9a-f]{32}")

# Of files of any kind.
RECORD = ".json"
ARRAY = ".npy"
TABLE = ".parquet"
LOCK = ".lock"  # a file of this name is in the catalog (held by import, embed and relocate), its removals and its locations
PART = "part-"
SHARD = "shard-"

# Of the catalog.
HEADER = "catalog.json"
SHARDS = "shards.parquet"
SAMPLES = "samples"
MEMBERS = "members.json"  # which members of the tars are images and captions; without it, those by default
LOCATIONS = "locations"
EXPORTS = "exports"

# Of numbered series.
SNAPSHOTS = "snapshots"
REMOVALS = "removals"
HEAD = "head.json"
FOUND = "found"
PUBLISHING = "publishing"

# Of logs of rejected samples.
REJECTED = "rejected"
IMPORT_LOG = "import"
SOURCES_LOG = "sources"
SCORES_LOG = "scores"
CLUSTER_IDS_LOG = "cluster-ids"
JOIN_LOG = "embeddings"
EMBED_LOG = "embed"

# Of an embedding column.
EMBEDDINGS = "embeddings"
COLUMN = "column.json"
JOINS = "joins.json"
UNFINISHED = "unfinished"

# Of artifacts: a folder for each kind, and in it one for each artifact.
CLUSTERINGS = "clusters"
SCORES = "scores"
NAMED_SCORES = "named-scores"
HASHES = "hashes"
COMPARISONS = "neighbours"
MATCHES = "matches"
DROP_LISTS = "drops"
PLANS = "plans"
CAPTIONS = "captions"
CONCEPTS = "concepts"
MANIFEST = "manifest.json"  # with it, an artifact is finished
PENDING = "pending.json"

# Columns of artifacts that have one file a part.
LABEL = "label"
SIMILARITY = "similarity"
RANK = "rank"
SCORE = "score"
HASH = "hash"
ENTRY_COUNT = "count"
ENTRY = "entry"
CAPTION_ENDS = "end"
CAPTION_TEXT = "text"
CONCEPT_ENDS = "ends"
CONCEPT = "concept"

# Of a clustering.
CENTROIDS = "centroids.npy"
CLUSTER_TABLE = "clusters.parquet"
FIT = "fit.json"

# Columns of comparisons, drop lists and plans that have one file a part, of plain names (see `plain_file`): also SIMILARITY and RANK.
NEAREST_ROW = "row"
NEXT_CLUSTERS = "next"
FATE = "fate-"  # and the number of a round
DROPPED = "dropped"
RATE = "rate"
GROUP = "group"
ORIGIN = "origin"

# Of a drop list, and of lists of entries and concepts.
DROPPED_TABLE = "dropped.parquet"
ENTRY_TABLE = "entries.parquet"

# Of a plan.
GROUP_TABLE = "groups.parquet"
QUOTAS = "quotas.npy"
SHARD_OFFSETS = "shard_offsets.npy"
MISSING = "missing.parquet"
SLOTS = "slots"
SLOTS_BEFORE = "before-"
UNITS = "units"
UNITS_OF = "epoch-"

# Scratch, until an artifact or a column is finished.
JOINING = "joining"
TRAINING = "training"
DENSITY = "density"
WORK = "work"
PAIRS = "pairs"
REPETITION = "repetition-"
SPILL = ".spill"


def part_name(number: int) -> str:
    """Return the stem of the files of one part."""
    return f"{PART}{number:06d}"


def plain_file(column: str, part: int) -> str:
    """Return the file of one part of a column. The first one has no number: a pool of one part has plain names."""
    return f"{column}{f'-{part:06d}' if part else ''}{ARRAY}"


def marker(path: Path) -> Path:
    """Return the record beside a file: it holds the file's hash, and is written last."""
    return path.with_suffix(RECORD)


def records_of(path: Path) -> list[Path]:
    """Return the records that may hold the hash of a file: the manifest of its artifact, and the marker beside it."""
    own = [marker(path)] if path.suffix != RECORD else []
    manifest = path.with_name(MANIFEST)
    if not is_stored(path):
        return [manifest, *own]
    return [manifest] if DIGEST.fullmatch(path.parent.name) else own  # each would take a request


def lock(path: Path) -> Path:
    """Return the lock file of a file or folder, beside it."""
    return path.with_name(f".{path.name}{LOCK}")


def unfinished(path: Path) -> Path:
    """Return the folder of an artifact that is being made, beside the one it becomes: in it, a folder for each configuration."""
    if is_stored(path):
        return path
    return path.with_name(f".{path.name}.{UNFINISHED}")


def numbered(folder: Path, number: int, suffix: str = RECORD) -> Path:
    """Return a file of one entry of a numbered series."""
    return folder / f"{number:06d}{suffix}"


def rejected_log(catalog: Path, *names: str) -> Path:
    """Return the log of rejected samples of a stage: `names` are the stage, and the part or artifact it worked on."""
    return catalog / REJECTED / f"{'-'.join(names)}{TABLE}"


def export_record(catalog: Path, output: str) -> Path:
    """Return the record that `run` keeps of an output outside the catalog, by the hash of its path."""
    return catalog / EXPORTS / f"{output}{RECORD}"


def slots_before(epoch: int) -> str:
    """Return the column with the slots of a plan before an epoch, in the folder SLOTS."""
    return f"{SLOTS_BEFORE}{epoch:09d}"
