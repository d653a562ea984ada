"""Names of all files and folders of a catalog. No other module spells one, and this one reads and writes nothing.

A stage names the files that it spills into a scratch folder, and reads again itself.
"""

from __future__ import annotations

from pathlib import Path

# Of files of any kind.
TEMPORARY_SUFFIX = ".writing"  # until a file is complete
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
LOCATIONS = "locations"
EXPORTS = "exports"

# Of numbered series.
SNAPSHOTS = "snapshots"
REMOVALS = "removals"
HEAD = "head.json"
FOUND = "found"
PUBLISHING = "publishing"

# Of lists of what was left out.
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
COMPARISONS = "neighbours"
MATCHES = "matches"
DROP_LISTS = "drops"
PLANS = "plans"
MANIFEST = "manifest.json"  # with it, an artifact is finished
PENDING = "pending.json"

# Columns of artifacts that have one file a part.
LABEL = "label"
SIMILARITY = "similarity"
RANK = "rank"
SCORE = "score"
ENTRY_COUNT = "count"
ENTRY = "entry"

# Of a clustering.
CENTROIDS = "centroids.npy"
CLUSTER_TABLE = "clusters.parquet"
FIT = "fit.json"

# Of a comparison, a drop list, and a list of entries.
NEAREST_SIMILARITY = "similarity.npy"
NEAREST_ROW = "row.npy"
DROPPED_MASK = "dropped.npy"
DROPPED_TABLE = "dropped.parquet"
ENTRY_TABLE = "entries.parquet"

# Of a plan.
RATE = "rate.npy"
GROUP = "group.npy"
GROUP_RANK = "rank.npy"
GROUP_TABLE = "groups.parquet"
QUOTAS = "quotas.npy"
SHARD_OFFSETS = "shard_offsets.npy"
SLOTS = "slots"
SLOTS_BEFORE = "before-"
UNITS = "units"
UNITS_OF = "epoch-"

# Scratch, until an artifact or a column is finished.
JOINING = "joining"
TRAINING = "training"
DENSITY = "density"
WORK = "work"
DECISIONS = "decisions"
PAIRS = "pairs"
REPETITION = "repetition-"
SPILL = ".spill"


def part_name(number: int) -> str:
    """Return the stem of the files of one part."""
    return f"{PART}{number:06d}"


def part_column(folder: Path, column: str, part: str) -> Path:
    """Return the file of one part of an artifact's column."""
    return folder / f"{column}-{part}{ARRAY}"


def marker(path: Path) -> Path:
    """Return the record beside a file: it notes the file's hash, and is written last."""
    return path.with_suffix(RECORD)


def lock(path: Path) -> Path:
    """Return the lock file beside a file or folder, for whoever writes it."""
    return path.with_name(f".{path.name}{LOCK}")


def numbered(folder: Path, number: int, suffix: str = RECORD) -> Path:
    """Return a file of one entry of a numbered series."""
    return folder / f"{number:06d}{suffix}"


def found(catalog: Path, removals: int, snapshot: int) -> Path:
    """Return the file of the rows that the first removals name in a snapshot."""
    return catalog / REMOVALS / FOUND / f"{removals:06d}-{snapshot:06d}{ARRAY}"


def rejected_log(catalog: Path, *names: str) -> Path:
    """Return the list of what was left out: of a stage, and of the import, part or clustering that it worked on."""
    return catalog / REJECTED / f"{'-'.join(names)}{TABLE}"


def export_record(catalog: Path, output: str) -> Path:
    """Return what `run` notes of an output outside the catalog, by the hash of its path."""
    return catalog / EXPORTS / f"{output}{RECORD}"


def finished_shard(column: Path, made_by: str, shard: int) -> Path:
    """Return the embeddings of one shard, whose part is not complete yet."""
    return column / UNFINISHED / made_by / f"{SHARD}{shard:08d}{ARRAY}"


def slots_before(plan: Path, epoch: int | str) -> Path:
    """Return the slots of all rows of a plan before an epoch."""
    return plan / SLOTS / f"{SLOTS_BEFORE}{epoch:09d}{ARRAY}"


def units_of(plan: Path, epoch: int) -> Path:
    """Return the units of an epoch of a plan."""
    return plan / UNITS / f"{UNITS_OF}{epoch:09d}{ARRAY}"
