"""Requests of users: dataclasses whose fields, defaults and docstrings are the options of the command line and of Python."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from tailwise.errors import UserError
from tailwise.rejects import MAX_REJECTED

OPTION = "option"  # in a field's metadata: the name of the option, if it differs from the field's; yes/no for a switch
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
OptionValue = str | int | float


@dataclass(frozen=True)
class SourceRequest:
    """How sources are read; None where the user said nothing.

    Attributes:
        embedding: DataComp: which embeddings, l14 or b32.  [default: l14]
        column: Parquet: column of the catalog that its embeddings go to: image, text or another name.  [default: image]
        of: Parquet: of a column of another name: image or text.
        id_column: Parquet: column of ids.  [default: uid, key, image_path or id]
        embedding_column: Parquet: column of vectors.  [default: embedding or embeddings]
        clustering: DynamiCS: name of the clustering made of its cluster ids.  [default: dynamics]
    """

    embedding: str | None = None
    column: str | None = None
    of: str | None = None
    id_column: str | None = None
    embedding_column: str | None = None
    clustering: str | None = None


@dataclass(frozen=True)
class ImportRequest(SourceRequest):
    """An import of shards, metadata and embeddings.

    Attributes:
        format_name: What the sources are: auto, webdataset, clip-retrieval, dynamics, datacomp or parquet.
        max_rejected: Stop when a greater share can't be used.  [default: 0.5 of the samples, 0.1 of the embeddings]
        workers: Processes; one a processor by default.
    """

    format_name: str = field(default="auto", metadata={OPTION: "format"})
    max_rejected: float | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        at_least(self, workers=1)


@dataclass(frozen=True)
class EncoderRequest:
    """How to load an encoder.

    Attributes:
        model: checkpoint: its model's name for open_clip, or local-dir:FOLDER; what the run says by default.
        pooling: transformers, vision models: cls, mean or pooler.  [default: cls for DINO and ViT, else pooler]
        precision: auto (bf16 where the device multiplies it natively, else fp32), bf16, fp32 or fp16.
        backend: Images on a CPU: torch, openvino or auto (OpenVINO where it is installed).
        device: auto, cpu, cuda (all GPUs), cuda:N.
    """

    model: str | None = None
    pooling: str | None = None
    precision: str = "auto"
    backend: str = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class EmbedRequest(EncoderRequest):
    """Embeddings of images and captions.

    Attributes:
        encoder: open_clip:MODEL/PRETRAINED, transformers:NAME_OR_FOLDER, checkpoint:PATH, lite0[:PIXELS] (a small ImageNet network,
            downloads nothing), or pixels (colours and edges, for tests only).
        column: What is embedded: image, text or both; or the name of another column, such as dino.
        of: Of a column of another name: image or text.
        batch_size: Rows; another number changes the last bits of an embedding.  [default: 256 on a GPU, 64 on a CPU]
        max_rejected: Stop when more than this share of the samples can't be embedded.
        workers: Processes that read and decode; one a processor by default.
    """

    encoder: str = field(kw_only=True)
    column: str = "image"
    of: str | None = None
    batch_size: int | None = None
    max_rejected: float = MAX_REJECTED
    workers: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        at_least(self, workers=1, batch_size=1)


@dataclass(frozen=True)
class ClusterRequest:
    """A clustering by spherical k-means; or, with `extends`, new samples assigned to the clusters of an older one.

    Attributes:
        k: Number of clusters, before merging. DBP: 500 for 280M samples; DynamiCS: 50,000.
        merge: Merge centroids whose cosine is at least this. DynamiCS: 0.7.
        density: Count the samples whose cosine to a centroid is at least this, for plans by `method` density;
            auto: that which 95 % of the samples have to their own.
        name: Name of the clustering.
        column: Embeddings to cluster: image, text, or the name of another column.
        seed: Decides the sample and the seeding.
        iterations: Of k-means, at most; it stops early when the mean cosine gains less than 1e-5.
        points_per_centroid: Rows that k-means is fitted on, per centroid, at most.
        without: A drop list (of dedup or filter), whose samples take no part; may be given again.
        extends: Instead of `k`: assign to the centroids of this clustering.
        max_memory: Refuse what needs more.
        device: auto, cpu or cuda; the result doesn't depend on it.
        force: Accept a collapsed clustering, or fewer clusters than asked for.
    """

    k: int | None = None
    merge: float | None = None
    density: float | str | None = None
    name: str = "main"
    column: str = "image"
    seed: int = 0
    iterations: int = 30
    points_per_centroid: int = 1000
    without: Sequence[str] = ()
    extends: str | None = None
    max_memory: str = "8GB"
    device: str = "auto"
    force: bool = False

    def __post_init__(self) -> None:
        """Take a density in text as a number; refuse what does nothing with `extends`."""
        if (self.k is None) == (self.extends is None):
            raise UserError("give either `k` K or `extends` CLUSTERING")
        if self.extends is not None:
            used = {"extends", "name", "without", "device", "force"}
            refuse_idle(self, used, "with `extends`: the centroids are there already")
        if isinstance(self.density, str) and self.density != "auto":
            try:
                object.__setattr__(self, "density", float(self.density))
            except ValueError:
                raise UserError(f"`density` {self.density!r}: must be auto, or a cosine in (0, 1]") from None


@dataclass(frozen=True)
class DedupRequest:
    """A drop list of near-duplicates.

    Attributes:
        epsilon: Duplicates have a cosine above 1 − epsilon; 0: identical embeddings.
        name: Name of the drop list.
        clustering: Clustering inside which samples are compared.
        rule: greedy: a duplicate of a kept one goes; any-earlier: of any earlier one.
        order: What comes first and is kept: farthest from the centroid, nearest, random, or score.
        score: With `order` score: which one, highest first.
        without: A drop list (of dedup or filter), whose samples take no part; may be given again.
        extends: A dedup of an earlier snapshot: judge new samples only.
        seed: Decides the random order, and what `suggest` samples.
        max_memory: Refuse what needs more.
        device: auto, cpu or cuda; the result doesn't depend on it.
    """

    epsilon: float | None = None
    name: str = "duplicates"
    clustering: str = "main"
    rule: str = "greedy"
    order: str = "farthest"
    score: str | None = None
    without: Sequence[str] = ()
    extends: str | None = None
    seed: int = 0
    max_memory: str = "4GB"
    device: str = "auto"


@dataclass(frozen=True)
class ScoreRequest:
    """Which score, and how.

    Attributes:
        name: of SCORES, or of a numeric column of the samples; with the option "file", of a column of that file.
        options: names of OPTIONS that the score has; those left out have their defaults.
    """

    name: str
    options: Mapping[str, OptionValue] = field(default_factory=dict)


@dataclass(frozen=True)
class FilterRequest:
    """A drop list of the samples whose score is outside of bounds, or not among the highest or lowest.

    Attributes:
        by: A score (listed above), or a numeric column of the samples or of `file`.
        minimum: Least score that stays.
        maximum: Greatest score that stays.
        keep: Samples of highest score that stay, as a share of the pool.
        keep_lowest: Samples of lowest score that stay, as a share of the pool.
        missing: Samples without the score: drop or keep.
        without: A drop list (of dedup or filter), whose samples take no part; may be given again.
        name: Name of the drop list.  [default: that of the score]
        file: .parquet, .tsv or .csv file with the column `by`, and uid, key or image_path.
        max_rejected: Of `file`: refuse if greater shares of its rows and of the samples don't match.  [default: 0.1]
        target: normsim: image embeddings (.npy), a clip-retrieval folder, or another catalog.
        norm: normsim: 2 or inf.  [default: 2]
        batch_size: cliploss: samples of a batch.  [default: 32768]
        repetitions: cliploss: batches that a sample is in.  [default: 5]
        temperature: cliploss.  [default: 0.01]
        seed: cliploss: decides the batches.  [default: 0]
    """

    by: str | ScoreRequest
    minimum: float | None = field(default=None, metadata={OPTION: "min"})
    maximum: float | None = field(default=None, metadata={OPTION: "max"})
    keep: float | None = None
    keep_lowest: float | None = None
    missing: str = "drop"
    without: Sequence[str] = ()
    name: str | None = None
    file: Path | None = None
    max_rejected: float | None = None
    target: Path | None = None
    norm: str | None = None
    batch_size: int | None = None
    repetitions: int | None = None
    temperature: float | None = None
    seed: int | None = None

    @property
    def score(self) -> ScoreRequest:
        """The score and its options."""
        if isinstance(self.by, ScoreRequest):
            return self.by
        names = ("file", "max_rejected", "target", "norm", "batch_size", "repetitions", "temperature", "seed")
        given = {name: getattr(self, name) for name in names}
        values = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
        return ScoreRequest(self.by, {name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class GroupRequest:
    """A grouping in place of clusters: by a column, or by the rarest entry of a list in each caption.

    Attributes:
        by: Column of text, whole numbers or booleans; "shard" is one.
        file: A .parquet, .tsv or .csv that has the column, and uid, key or image_path.
        max_rejected: Of `file`: refuse if greater shares of its rows and of the samples don't match.  [default: 0.1]
        entries: In place of `by`: a list of words and phrases, one a line; a sample's group is the rarest one in its caption.
        ignore_case: Of `entries`: compare in lower case.
        name: Name of the grouping.  [default: the column's, or entries]
        missing: Samples without a value or an entry: leave-out (no plan draws them) or own-group.
        max_misses: Of `entries`: refuse if a greater share of samples has no entry.  [default: 0.5]
        allow_misses: Of `entries`: accept any share of samples without an entry.
        without: A drop list (of dedup or filter), whose samples take no part; may be given again.
        workers: Of `entries`: processes; one a processor by default.
    """

    by: str | None = None
    file: Path | None = None
    max_rejected: float | None = None
    entries: Path | None = None
    ignore_case: bool = False
    name: str | None = None
    missing: str = "leave-out"
    max_misses: float | None = None
    allow_misses: bool = False
    without: Sequence[str] = ()
    workers: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        at_least(self, workers=1)
        if (self.by is None) == (self.entries is None):
            raise UserError("give one of `by` COLUMN and `entries` FILE")
        shared = {"name", "missing", "without"}
        if self.entries is not None:
            own = {"entries", "ignore_case", "max_misses", "allow_misses", "workers"}
            refuse_idle(self, own | shared, "with `entries`")
        else:
            refuse_idle(self, {"by", "file", "max_rejected", *shared}, "without `entries`")


@dataclass(frozen=True)
class PlanRequest:
    """Settings of a plan. None means the method's own default.

    Attributes:
        method: One of those above.
        keep: Budget, as a share of the pool: all imported samples that are not removed, dropped ones included.
        budget: Budget, in samples: per epoch, or in all if static.
        per_cluster: cap, flat: at most this number of samples of each cluster.
        clustering: Name of the clustering, or grouping.  [default: main]
        without: A drop list (of dedup or filter), whose samples take no part; may be given again.
        alpha: dynamics: quota in proportion to size^alpha.  [default: 0.2]
        alpha_end: dynamics: alpha after `anneal_epochs`; linear until then.
        anneal_epochs: See `alpha_end`.
        temperature: dbp: of the softmax over complexity.  [default: 0.1]
        neighbours: dbp: number of nearest other centroids that d_inter is taken over.  [default: 20]
        options: An option of a method of your own; may be given again.
        final_options: As `alpha_end`, for any option of a method; may be given again.
        max_repeats: Copies of a sample per epoch, at most (1 to 255).
        min_per_cluster: Least quota of a cluster.  [default: 1 for dbp, else 0]
        class_balance: Raises that to this share of budget / clusters (ssp, dbp).
        pick: Members first: random, hardest, easiest, highest, lowest (score).
        score: Score of the picks highest and lowest.  [default: clip-score]
        dynamic: Draw again in each epoch, or once.
        draw: stream (exact counts) or bernoulli.  [default: stream]
        seed: Decides the draw.
        rates: Method rates: .json {key: rate} or .parquet of rates.
        rate_column: Column of the .parquet of rates.  [default: rate]
        missing_rate: Rate of samples that the file of rates does not name; without it, an error.
        max_rejected: Method rates: refuse if greater shares of its rows and of the samples do not match.  [default: 0.1]
        entries: Method text-balance: a list of entries, balanced as in MetaCLIP.
        per_entry: Method text-balance: t, samples per entry. MetaCLIP: 20000.
        ignore_case: Method text-balance: compare in lower case.
    """

    method: str = ""
    keep: float | None = None
    budget: int | None = None
    per_cluster: int | None = None
    clustering: str | None = None
    without: Sequence[str] = ()
    alpha: float | None = None
    alpha_end: float | None = None
    anneal_epochs: int | None = None
    temperature: float | None = None
    neighbours: int | None = None
    options: Mapping[str, float] = field(default_factory=dict, metadata={OPTION: "option"})
    final_options: Mapping[str, float] = field(default_factory=dict, metadata={OPTION: "final-option"})
    max_repeats: int = 1
    min_per_cluster: int | None = None
    class_balance: float | None = None
    pick: str | None = None
    score: str | ScoreRequest | None = None
    dynamic: bool | None = field(default=None, metadata={OPTION: "dynamic/static"})
    draw: str | None = None
    seed: int = 0
    rates: Path | None = None
    rate_column: str | None = None
    missing_rate: float | None = None
    max_rejected: float | None = None
    entries: Path | None = None
    per_entry: int | None = None
    ignore_case: bool = False

    def __post_init__(self) -> None:
        """Set the method that the given file implies."""
        if not self.method:
            method = "rates" if self.rates is not None else "text-balance" if self.entries is not None else ""
            object.__setattr__(self, "method", method)


@dataclass(frozen=True)
class ShardsRequest:
    """New shards of an epoch.

    Attributes:
        shard_samples: Shards: samples of each new one, at most; all have that many, or up to a few less.
        workers: Shards: processes; one a processor by default.
        max_rejected: Shards: share of the samples that may be left out because they can't be read.
    """

    shard_samples: int = 10_000
    workers: int | None = None
    max_rejected: float = 0.01

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        at_least(self, workers=1, shard_samples=1)
        if not 0 <= self.max_rejected <= 1:
            raise UserError(f"`max_rejected` {self.max_rejected}: must lie in [0, 1]")


@dataclass(frozen=True)
class TrainRequest:
    """A training; None leaves it to the recipe, to the run that is resumed, or to the default.

    Attributes:
        epochs: Of the plan.
        samples_seen: In place of epochs.
        checkpoint_every: Batches, at most.  [default: a twentieth of all, at most 1000 steps]
        resume: Go on after the last checkpoint, if there is one.
        seed: Of order, augmentations and weights.  [default: the plan's]
        lanes: Places of the pool that a batch is taken from.  [default: about 64]
        block: Samples of a lane that are shuffled together.
        compose: shuffle, spread or diverse.  [default: shuffle]
        check: Of the shards, before starting: none, size or index.
        damaged: Tars that are missing, changed or fail: error or replace.
        max_replaced: Share of samples that may be replaced.
        cache: Folder for what is fetched from remote shards.
        cache_size: Bound of the cache.
        record: Folder for a record of the rows and pixels of each batch.
    """

    epochs: int | None = None
    samples_seen: int | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    seed: int | None = None
    lanes: int | None = None
    block: int | None = None
    compose: str | None = None
    check: str = "size"
    damaged: str = "error"
    max_replaced: float = 0.01
    cache: Path | None = None
    cache_size: str = "32GB"
    record: Path | None = None

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        at_least(self, epochs=1, samples_seen=1, checkpoint_every=1, lanes=1, block=1)


@dataclass(frozen=True)
class EvaluateRequest:
    """An evaluation of a checkpoint.

    Attributes:
        model: open_clip's name, or local-dir:FOLDER.  [default: the run's]
        classes: Names of the classes, one a line.  [default: the set's]
        templates: Prompts with {c}, one a line.  [default: the set's, else OpenAI's 80]
        train_counts: CSV, TSV or JSON: how often each class was trained on.
        pool: A catalog, in whose captions to count the classes instead.
        groups: Head, medium, few: thirds, or bounds such as 100,20 (head above 100, few below 20).
        batch_size: Images, or fewer at the end of a shard.
        workers: Processes that decode; one a processor by default.
        device: auto, cpu, cuda, ….
        precision: fp32 or bf16.
        bootstrap: Replicates, for the intervals.
        seed: Of the bootstrap.
        max_rejected: Stop when a greater share of a set's samples can't be read.
    """

    model: str | None = None
    classes: Path | None = None
    templates: Path | None = None
    train_counts: Path | None = None
    pool: Path | None = None
    groups: str = "thirds"
    batch_size: int = 256
    workers: int | None = None
    device: str = "auto"
    precision: str = "fp32"
    bootstrap: int = 1000
    seed: int = 0
    max_rejected: float = MAX_REJECTED

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        at_least(self, workers=0, batch_size=1, bootstrap=1, seed=0)


def at_least(request: Any, **bounds: int) -> None:  # noqa: ANN401  (any request)
    """Refuse fields of a request that are less than a bound; None is no value.

    Raises:
        UserError: one is; names field, value and bound.
    """
    for name, bound in bounds.items():
        if (value := getattr(request, name)) is not None and value < bound:
            raise UserError(f"`{name}` {value}: must be at least {bound}")


def refuse_given(request: Any, idle: Collection[str], why: str) -> None:  # noqa: ANN401  (any request)
    """Refuse fields of a request that were given and would do nothing.

    Args:
        request: a dataclass of this module.
        idle: names of the fields that do nothing.
        why: they do nothing.

    Raises:
        UserError: one has another value than its default.
    """
    for item in fields(request):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if item.name in idle and getattr(request, item.name) not in (default, []):
            raise UserError(f"`{item.name}` does nothing {why}")


def refuse_idle(request: Any, used: Collection[str], why: str) -> None:  # noqa: ANN401  (any request)
    """Refuse all fields but those that are used; see `refuse_given`."""
    refuse_given(request, {item.name for item in fields(request)}.difference(used), why)


def bytes_of(parameter: str, text: str) -> int:
    """Return the number of bytes that a text like 8GB names; a UserError names the parameter."""
    try:
        size = float(text[:-2]) * UNITS[text[-2:].upper()]
    except (KeyError, ValueError):
        size = math.nan
    if not 0 < size < math.inf:
        raise UserError(f"`{parameter}` {text!r}: give a number above 0 and one of {', '.join(UNITS)}, such as 8GB")
    return int(size)
