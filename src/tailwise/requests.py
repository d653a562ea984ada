"""Requests of users: dataclasses whose fields, defaults and help are the options of the command line and of Python.

A field is `Annotated[type, help]`; where the option has another name than the field, that name follows: "--min", "--dynamic/--static".
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from tailwise.errors import MAX_REJECTED, UserError

PROJECTIONS = ("pca", "umap")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
OptionValue = str | int | float
# Options that name a file to read: fields of requests, and the option --from.
FILES = frozenset({"entries", "file", "only", "exclude", "head", "rates", "score_file", "shares", "from"})
FILES |= {"classes", "templates", "train_counts"}

_given: ContextVar[frozenset[str]] = ContextVar("given", default=frozenset())  # fields that the user named

# Fields of several requests.
Device = Annotated[str, "auto, cpu or cuda; the result doesn't depend on it."]
MaxMemory = Annotated[str, "Refuse what needs more."]
UnmatchedRows = Annotated[
    float | None, "Of `file`: refuse greater shares of unmatched rows or samples.  [default: 0.1]"
]
Match = Annotated[
    str | None,
    "What the file names samples by: uid, key, shard (its path, and key), url, sha256 or md5.  [default: what fits best]",
]
Without = Annotated[Sequence[str], "A drop list (of dedup or filter) whose samples take no part; may be given again."]
Workers = Annotated[int | None, "Processes; one a processor by default."]


@dataclass(frozen=True)
class SourceRequest:
    """How sources are read; None where the user said nothing."""

    embedding: Annotated[str | None, "DataComp: which embeddings, l14 or b32.  [default: l14]"] = None
    column: Annotated[str | None, "Parquet: column of embeddings: image, text or another.  [default: image]"] = None
    of: Annotated[str | None, "Parquet: of a column of another name: image or text."] = None
    id_column: Annotated[str | None, "Parquet: column of ids.  [default: uid, key, image_path or id]"] = None
    embedding_column: Annotated[str | None, "Parquet: column of vectors.  [default: embedding or embeddings]"] = None
    clustering: Annotated[str | None, "DynamiCS: name of the clustering of cluster ids.  [default: dynamics]"] = None
    image: Annotated[
        str | None,
        "Suffixes (tars) or columns (Parquet) of images, the preferred first.  [default: the catalog's, or jpg,jpeg,png,webp]",
    ] = None
    caption: Annotated[
        str | None,
        "Suffixes or columns of captions, or json:FIELD, the preferred first.  [default: the catalog's, or txt]",
    ] = None


@dataclass(frozen=True)
class ImportRequest(SourceRequest):
    """An import of shards, metadata and embeddings."""

    format_name: Annotated[
        str, "auto, webdataset, parquet-images, files, clip-retrieval, dynamics, datacomp, urls or parquet.", "--format"
    ] = "auto"
    max_rejected: Annotated[
        float | None, "Share that may be unusable.  [default: 0.5 of samples, 0.1 of embeddings]"
    ] = None
    update: Annotated[bool, "Replace the samples of shards that have changed since they were imported."] = False
    workers: Workers = None

    def __post_init__(self) -> None:
        at_least(self, workers=1)


@dataclass(frozen=True)
class CaptionsRequest:
    """Captions from a table, joined to the samples."""

    name: Annotated[str, "Name of the captions; original is that of the samples' own."] = field(kw_only=True)
    by: Annotated[
        str | None,
        "What names the samples: uid, key, image_path, sha256, md5 or url.  [default: the first that the table has]",
    ] = None
    id_column: Annotated[str | None, "Column of these names.  [default: that of `by`]"] = None
    column: Annotated[str | None, "Column of the captions.  [default: caption, text, re_caption or recaption]"] = None
    max_rejected: Annotated[float, "Stop when more than this share of the captions can't be used."] = MAX_REJECTED


@dataclass(frozen=True)
class ConceptsRequest(CaptionsRequest):
    """Several concepts a sample: lists from a table, from the JSON in tars, from captions, or those that other lists agree on."""

    name: Annotated[str, "Name of the lists."] = field(kw_only=True)
    column: Annotated[
        str | None,
        "Column of lists, of Parquet or of JSON in text.  [default: concepts, tags, entities, labels or classes]",
    ] = None
    max_rejected: Annotated[float, "Stop when more than this share of the rows can't be used."] = MAX_REJECTED
    max_misses: Annotated[float, "Stop when a greater share of the samples has no concept."] = 0.9
    ignore_case: Annotated[bool, "Take names in lower case; of `entries`: compare in lower case."] = False
    entries: Annotated[
        Path | None, "In place of tables: a list of words and phrases, one a line; a sample has those in its caption."
    ] = None
    plurals: Annotated[bool, "Of `entries`: regular English plurals and singulars match too."] = False
    workers: Annotated[int | None, "Of `entries`: processes; one a processor by default."] = None
    both: Annotated[
        Sequence[str],
        "In place of tables: other lists of concepts; a sample has the concepts that all of them give it. Give it twice or more.",
    ] = ()

    def __post_init__(self) -> None:
        at_least(self, workers=1)
        if self.entries is not None:
            refuse_idle(self, {"name", "entries", "max_misses", "ignore_case", "plurals", "workers"}, "with `entries`")
        elif self.both:
            refuse_idle(self, {"name", "both", "max_misses"}, "with `both`")
            if len(set(self.both)) < max(2, len(self.both)):
                raise UserError(f"`both` {', '.join(self.both)}: name two lists of concepts or more, each once")
        else:
            refuse_given(self, {"plurals", "workers"}, "without `entries`")


@dataclass(frozen=True)
class EncoderRequest:
    """How to load an encoder."""

    model: Annotated[str | None, "checkpoint: open_clip's name, or local-dir:FOLDER.  [default: the run's]"] = None
    pooling: Annotated[
        str | None, "Vision models: cls, mean, pooler.  [default: cls for DINO and ViT, else pooler]"
    ] = None
    precision: Annotated[str, "auto (bf16 where the device multiplies it, else fp32), bf16, fp32 or fp16."] = "auto"
    backend: Annotated[str, "Images on a CPU: torch, openvino or auto (OpenVINO where it is installed)."] = "auto"
    device: Annotated[str, "auto, cpu, cuda (all GPUs), cuda:N."] = "auto"


@dataclass(frozen=True)
class EmbedRequest(EncoderRequest):
    """Embeddings of images and captions."""

    encoder: Annotated[
        str,
        "open_clip:MODEL/PRETRAINED, transformers:NAME_OR_FOLDER, timm:MODEL[/WEIGHTS], checkpoint:PATH, lite0[:PIXELS] (a "
        "small ImageNet network, downloads nothing), pixels (colours and edges, for tests only), or of columns that are "
        "there: joint:image=0.5,text=0.5 (weighted, concatenated).",
    ] = field(kw_only=True)
    column: Annotated[str, "To embed: image, text or both; or the name of another column, such as dino."] = "image"
    of: Annotated[str | None, "Of a column of another name: image or text."] = None
    captions: Annotated[
        str | None, "Of text: joined captions to embed, and the samples' own where there are none.  [default: original]"
    ] = None
    batch_size: Annotated[int | None, "Rows; the last bits depend on it.  [default: 256 on a GPU, 64 on a CPU]"] = None
    max_rejected: Annotated[float, "Stop when more than this share of the samples can't be embedded."] = MAX_REJECTED
    workers: Annotated[int | None, "Processes that read and decode; one a processor by default."] = None

    def __post_init__(self) -> None:
        at_least(self, workers=1, batch_size=1)


@dataclass(frozen=True)
class ClusterRequest:
    """A clustering by spherical k-means; or, with `extends`, new samples assigned to the clusters of an older one."""

    k: Annotated[int | None, "Number of clusters, before merging. DBP: 500 for 280M samples; DynamiCS: 50,000."] = None
    merge: Annotated[float | None, "Merge centroids whose cosine is at least this. DynamiCS: 0.7."] = None
    density: Annotated[
        float | str | None,
        "Count samples of at least this cosine to a centroid, for `method` density; auto: as 95 % of its own have.",
    ] = None
    name: Annotated[str, "Name of the clustering."] = "main"
    column: Annotated[str, "Embeddings to cluster: image, text, or the name of another column."] = "image"
    seed: Annotated[int, "Decides the sample and the seeding."] = 0
    iterations: Annotated[int, "Of k-means, at most; it stops early when the mean cosine gains less than 1e-5."] = 30
    points_per_centroid: Annotated[int, "Rows that k-means is fitted on, per centroid, at most."] = 1000
    without: Without = ()
    extends: Annotated[str | None, "Instead of `k`: assign to the centroids of this clustering."] = None
    max_memory: MaxMemory = "8GB"
    device: Device = "auto"
    force: Annotated[bool, "Accept a collapsed clustering, or fewer clusters than asked for."] = False

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
    """A drop list of near-duplicates, of identical images (`exact`), or of images that evaluation sets hold (`against`)."""

    epsilon: Annotated[float | None, "Duplicates have a cosine above 1 − epsilon; 0: identical embeddings."] = None
    target_share: Annotated[
        float | None, "In place of `epsilon`: share of the pool that stays; finds the epsilon that keeps it."
    ] = None
    exact: Annotated[
        str | None, "Compare hashes, without embeddings: bytes (of the image files) or pixels (decoded)."
    ] = None
    against: Annotated[
        Sequence[str],
        "An evaluation set, whose images leave the pool, by `epsilon`, `exact` pixels or both: a set as of tailwise evaluate, a "
        "folder of images, a catalog, or embeddings (.npy, img_emb/); may be given again.",
    ] = ()
    mirrored: Annotated[bool, "Of `against`: compare the mirror images of the set, too."] = False
    name: Annotated[
        str | None, "Name of the drop list.  [default: duplicates; identical with `exact`, contaminated with `against`]"
    ] = None
    clustering: Annotated[str, "Clustering inside which samples are compared."] = "main"
    column: Annotated[
        str | None, "Embeddings to compare.  [default: those of the clustering; image with `against`]"
    ] = None
    probe: Annotated[int, "Nearest clusters of a sample inside which it is compared."] = 2
    rule: Annotated[str, "greedy: a duplicate of a kept one goes; any-earlier: of any earlier one."] = "greedy"
    order: Annotated[
        str | None,
        "First, and kept: farthest from the centroid, nearest, random, or score.  [default: farthest; by row with `exact`]",
    ] = None
    score: Annotated[str | None, "With `order` score: which one, highest first."] = None
    without: Without = ()
    extends: Annotated[str | None, "A dedup of an earlier snapshot: judge new samples only."] = None
    seed: Annotated[int, "Decides the random order, and what `suggest` samples."] = 0
    max_memory: MaxMemory = "4GB"
    device: Device = "auto"

    def __post_init__(self) -> None:
        """Refuse what does nothing with the way of comparing that is asked for."""
        if self.against:
            used = {"against", "epsilon", "exact", "mirrored", "name", "column", "without", "device"}
            refuse_idle(self, used, "with `against`")
            if self.epsilon is None:
                refuse_given(self, {"column"}, "without `epsilon`: images are compared by their pixels alone")
        elif self.exact is not None:
            refuse_idle(self, {"exact", "name", "order", "score", "without", "seed"}, "with `exact`")
            if self.order != "random":
                refuse_given(self, {"seed"}, "with `exact`, without `order` random")
        else:
            refuse_given(self, {"mirrored"}, "without `against`")

    @property
    def list_name(self) -> str:
        """Name of the drop list."""
        return self.name or name_of_dedup(self.against, self.exact)


def name_of_dedup(against: Sequence[str] | None, exact: str | None) -> str:
    """Return the name of a drop list of `dedup` that the user does not name."""
    return "contaminated" if against else "identical" if exact else "duplicates"


@dataclass(frozen=True)
class ScoreRequest:
    """Which score, and how.

    Attributes:
        name: of SCORES, or of a numeric column of the samples; with the option "file", of a column of that file.
        options: names of OPTIONS that the score has; those left out have their defaults.
    """

    name: str
    options: Mapping[str, OptionValue] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Options of scores; None where the user said nothing."""

    file: Annotated[
        Path | None,
        "Scores made elsewhere: .parquet, .csv, .tsv or .jsonl with a column of scores and one of names, .json {name: score}, or .npy "
        "(dtype u8,u8,f4: uid and score).",
    ] = None
    match: Match = None
    strict: Annotated[float | None, "Of a file: refuse if a smaller share of its names belongs to samples."] = None
    max_rejected: UnmatchedRows = None
    image: Annotated[str | None, "clip-score, cliploss, normsim, `head`: column of embeddings.  [default: image]"] = (
        None
    )
    text: Annotated[str | None, "clip-score, cliploss: column of embeddings.  [default: text]"] = None
    captions: Annotated[
        str | None, "caption-words, caption-characters: joined captions to count in.  [default: original]"
    ] = None
    target: Annotated[
        Path | None, "normsim, near-target: image embeddings (.npy), clip-retrieval folder, or catalog."
    ] = None
    clustering: Annotated[str | None, "near-target: clustering whose whole clusters stay.  [default: main]"] = None
    norm: Annotated[str | None, "normsim: 2 or inf.  [default: 2]"] = None
    batch_size: Annotated[int | None, "cliploss: samples of a batch.  [default: 32768]"] = None
    repetitions: Annotated[int | None, "cliploss: batches that a sample is in.  [default: 5]"] = None
    temperature: Annotated[float | None, "cliploss.  [default: 0.01]"] = None
    seed: Annotated[int | None, "cliploss: decides the batches; `refill` random: the samples.  [default: 0]"] = None

    @property
    def options(self) -> dict[str, OptionValue]:
        """The options that are given, as a `ScoreRequest` takes them."""
        given = {item.name: getattr(self, item.name) for item in fields(ScoreOptions)}
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in given.items() if value is not None
        }


@dataclass(frozen=True, kw_only=True)
class NamedScoreRequest(ScoreOptions):
    """A score under a name of its own: from a file, by a head on embeddings, or as a mix of other scores."""

    name: Annotated[str, "Name of the score, for --by of filter and --score of plan."]
    column: Annotated[str | None, "Of `file`: column of the scores.  [default: the name of the score]"] = None
    head: Annotated[
        Path | None, "Weights of linear layers with one output: .safetensors, or a state_dict (.pth, .pt)."
    ] = None
    activation: Annotated[
        str | None, "Of `head`, between several layers: none or relu.  [default: none for LAION's aesthetic predictors]"
    ] = None
    mix: Annotated[str | None, 'Sum of other scores: "0.7*z(cliploss) + 0.3*z(normsim)"; z standardises.'] = None
    without: Annotated[Sequence[str], "Of `mix`: a drop list whose samples z leaves aside; may be given again."] = ()

    def __post_init__(self) -> None:
        if [self.file, self.head, self.mix].count(None) != 2:
            raise UserError("give one of `file` FILE, `head` FILE and `mix` EXPRESSION")
        of_file = {"column", "match", "strict", "max_rejected"}
        if self.file is not None:
            refuse_idle(self, {"name", "file"} | of_file, "with `file`")
        elif self.head is not None:
            refuse_idle(self, {"name", "head", "activation", "image"}, "with `head`")
        else:
            refuse_given(self, {"activation"} | of_file, "with `mix`")

    @property
    def score(self) -> ScoreRequest:
        """The score of `file` or `head`, and its options."""
        own = {"column": self.column, "head": self.head and str(self.head.expanduser()), "activation": self.activation}
        return ScoreRequest(self.name, {**self.options, **{name: value for name, value in own.items() if value}})


@dataclass(frozen=True)
class FilterRequest(ScoreOptions):
    """A drop list of the samples whose score is outside of bounds, or not among the highest or lowest; or that a list names, or doesn't."""

    by: Annotated[
        str | ScoreRequest | None, "A score (listed above), or a numeric column of the samples or of `file`."
    ] = None
    minimum: Annotated[float | None, "Least score that stays.", "--min"] = None
    maximum: Annotated[float | None, "Greatest score that stays.", "--max"] = None
    keep: Annotated[float | None, "Samples of highest score that stay, as a share of the pool."] = None
    keep_lowest: Annotated[float | None, "Samples of lowest score that stay, as a share of the pool."] = None
    rule: Annotated[
        str | None, "Of `keep`: datacomp, as its toolkit: all samples with the score of the last one stay."
    ] = None
    missing: Annotated[str, "Samples without the score: drop or keep."] = "drop"
    without: Without = ()
    name: Annotated[str | None, "Name of the drop list.  [default: that of the score, or only, or not]"] = None
    only: Annotated[
        Path | None,
        "In place of `by`: keep the samples that a file names: .npy (DataComp), .txt, .csv, .tsv, .jsonl or .parquet.",
    ] = None
    exclude: Annotated[Path | None, "In place of `by`: drop the samples that a file names.", "--not"] = None
    refill: Annotated[
        str | None,
        "Of `only`: other samples take the place of missing and dropped ones, so that as many stay as the file has different names: random "
        "(by `seed`), or those of the highest score of this name, as of `by`. It takes no method of plan.",
    ] = None

    def __post_init__(self) -> None:
        """Refuse what does nothing with a score, or with a list."""
        given = {"by": self.by, "only": self.only, "not": self.exclude}
        if sum(value is not None for value in given.values()) != 1:
            raise UserError("give one of `by` SCORE, `only` FILE and `exclude` FILE")
        listing = {"only", "exclude", "match", "strict", "refill"}
        if self.by is not None:
            refuse_given(self, {"refill"}, "with `by`: it is for lists, see `only`")
            if self.file is None:
                refuse_given(self, {"match", "strict"}, "with `by`, without `file`")
            if self.keep is None:
                refuse_given(self, {"rule"}, "without `keep`")
            return
        of_score = {*self.__dataclass_fields__} - listing - {"by", "without", "name"}
        if self.exclude is not None:
            refuse_given(self, {"refill"} | of_score, "with `exclude`")
        elif self.refill is None:
            refuse_given(self, of_score, "with `only`, without `refill`")
        else:
            refuse_given(self, {"minimum", "maximum", "keep", "keep_lowest", "rule", "missing"}, "with `only`")
            if self.refill == "random":
                refuse_given(self, of_score - {"seed"}, "with `refill` random")
        if self.strict is not None and not 0 <= self.strict <= 1:
            raise UserError(f"`strict` {self.strict}: must lie between 0 and 1")

    @property
    def list_name(self) -> str:
        """Name of the drop list, if the user gives none."""
        return "only" if self.only is not None else "not" if self.exclude is not None else self.score.name

    @property
    def score(self) -> ScoreRequest:
        """The score, of `by` or `refill`, and its options."""
        if isinstance(self.by, ScoreRequest):
            return self.by
        of_list = () if self.by is not None else ("match", "strict")
        options = {name: value for name, value in self.options.items() if name not in of_list}
        return ScoreRequest(self.by or self.refill or "", options)


@dataclass(frozen=True)
class BaselinesRequest:
    """Subsets of DataComp's baselines, from its metadata."""

    only: Annotated[Sequence[str], "Write this baseline; may be given again.  [default: all six]"] = ()
    language: Annotated[
        str | None, "Languages of the captions: a column of the metadata, or a table with the columns uid and language."
    ] = None
    laion_language: Annotated[str | None, "Languages for laion2b.  [default: those of `language`]"] = None
    entities: Annotated[Path | None, "text_based: list of words, one a line."] = None
    centroids: Annotated[Path | None, "image_based: centroids of the pool (.npy), of any norm."] = None
    target: Annotated[Path | None, "image_based: image embeddings of the target (.npy)."] = None


@dataclass(frozen=True)
class GroupRequest:
    """A grouping in place of clusters: by a column, or by the rarest entry of a list in each caption; or a list to begin with."""

    by: Annotated[
        str | None,
        'Column of text, whole numbers or booleans; "shard" is one. Or "source": the folder that a shard comes from.',
    ] = None
    file: Annotated[Path | None, "A .parquet, .tsv or .csv with the column, and uid, key, url, sha256 or md5."] = None
    max_rejected: UnmatchedRows = None
    entries: Annotated[
        Path | None,
        "In place of `by`: a list of words and phrases, one a line (shirt|shirts is one); a sample's group is the rarest in its caption.",
    ] = None
    concepts: Annotated[
        str | None, "In place of `by`: lists of concepts; a sample's group is the rarest of its list."
    ] = None
    ignore_case: Annotated[bool, "Of `entries`: compare in lower case."] = False
    plurals: Annotated[bool, "Of `entries`: regular English plurals and singulars match too."] = False
    name: Annotated[str | None, "Name of the grouping.  [default: the column's or the lists', or entries]"] = None
    missing: Annotated[str, "Samples without value, entry or concept: leave-out (never drawn) or own-group."] = (
        "leave-out"
    )
    max_misses: Annotated[float | None, "Of `entries`: refuse if a greater share has no entry.  [default: 0.5]"] = None
    allow_misses: Annotated[bool, "Of `entries`: accept any share of samples without an entry."] = False
    without: Without = ()
    workers: Annotated[int | None, "Of `entries`: processes; one a processor by default."] = None
    suggest: Annotated[bool, "Make no groups; show frequent terms of the captions, for a list of entries."] = False
    terms: Annotated[int, "Of `suggest`: how many terms."] = 200
    output: Annotated[Path | None, "Of `suggest`: file to write the list to, for `entries`."] = None
    overwrite: Annotated[bool, "Of `suggest`: replace another list in `output`."] = False

    def __post_init__(self) -> None:
        at_least(self, workers=1, terms=1)
        matching = {"ignore_case", "plurals", "workers"}
        if self.suggest:
            refuse_idle(self, {"suggest", "terms", "output", "overwrite", "without"} | matching, "with `suggest`")
            return
        refuse_given(self, {"terms", "output", "overwrite"}, "without `suggest`")
        if [self.by, self.entries, self.concepts].count(None) != 2:
            raise UserError("give one of `by` COLUMN, `entries` FILE and `concepts` NAME, or `suggest`")
        shared = {"name", "missing", "without"}
        if self.concepts is not None:
            refuse_idle(self, {"concepts", *shared}, "with `concepts`")
        elif self.entries is not None:
            refuse_idle(self, {"entries", "max_misses", "allow_misses"} | matching | shared, "with `entries`")
        else:
            refuse_idle(self, {"by", "file", "max_rejected", *shared}, "without `entries`")


@dataclass(frozen=True)
class PlanRequest:
    """Settings of a plan. None means the method's own default."""

    method: Annotated[str, "One of those above."] = ""
    keep: Annotated[float | None, "Budget, as a share of the pool (all but removed samples; dropped ones count)."] = (
        None
    )
    budget: Annotated[int | None, "Budget, in samples: per epoch, or in all if static."] = None
    per_cluster: Annotated[int | None, "cap, flat: at most this number of samples of each cluster."] = None
    clustering: Annotated[str | None, "Name of the clustering, or grouping.  [default: main; source for mixture]"] = (
        None
    )
    without: Without = ()
    alpha: Annotated[
        float | None,
        "dynamics, density, soft-cap: the exponent. scs: each copy of a sample lowers its logit by it.  [default: 0.2; scs: 0.15]",
    ] = None
    alpha_end: Annotated[float | None, "dynamics: alpha after `anneal_epochs`; linear until then."] = None
    anneal_epochs: Annotated[int | None, "See `alpha_end`."] = None
    temperature: Annotated[
        float | None, "Of the softmax: dbp, over complexity; scs, hcs, over the score.  [default: 0.1; scs, hcs: 1]"
    ] = None
    neighbours: Annotated[int | None, "dbp: nearest other centroids that d_inter is taken over.  [default: 20]"] = None
    threshold: Annotated[
        float | None, "soft-cap: quota in proportion to size up to this size.  [default: mean size of the clusters]"
    ] = None
    options: Annotated[Mapping[str, float], "An option of a method of your own; may be given again.", "--option"] = (
        field(default_factory=dict)
    )
    final_options: Annotated[
        Mapping[str, float], "As `alpha_end`, for any option of a method; may be given again.", "--final-option"
    ] = field(default_factory=dict)
    max_repeats: Annotated[
        int | None, "Copies of a sample per epoch, at most (1 to 255).  [default: 1; with `of`, the bound of that plan]"
    ] = None
    above_one: Annotated[
        str,
        "Quotas above `max_repeats` per sample: refill (other clusters get what is above) or truncate (no cluster does, "
        "and less than the budget is drawn, as in DynamiCS's code).",
    ] = "refill"
    min_per_cluster: Annotated[int | None, "Least quota of a cluster.  [default: 1 for dbp, else 0]"] = None
    class_balance: Annotated[float | None, "Raises that to this share of budget / clusters (ssp, dbp)."] = None
    pick: Annotated[str | None, "Members first: random, hardest, easiest, highest, lowest (score)."] = None
    score: Annotated[
        str | ScoreRequest | None,
        "Score of scs, hcs, and of the picks highest and lowest.  [default of picks: clip-score]",
    ] = None
    score_file: Annotated[
        Path | None, "A file of scores, such as a table with the column `score` and uid, key, url, sha256 or md5."
    ] = None
    logits: Annotated[bool, "scs, hcs: use the score as it is, a logit; it is standardised by default."] = False
    dynamic: Annotated[bool | None, "Draw again in each epoch, or once.", "--dynamic/--static"] = None
    draw: Annotated[str | None, "stream (exact counts) or bernoulli.  [default: stream; bernoulli for rates]"] = None
    seed: Annotated[int, "Decides the draw."] = 0
    rates: Annotated[
        Path | None,
        "Method rates: .json {name: rate}, a table with a column of rates, or .npy (DataComp) or .txt without: a name given twice is "
        "drawn twice.",
    ] = None
    rate_column: Annotated[str | None, "Column of rates, of a table.  [default: rate]"] = None
    missing_rate: Annotated[
        float | None, "Rate of samples that the file does not name; without it, an error, and 0 for .npy and .txt."
    ] = None
    match: Match = None
    max_rejected: Annotated[
        float | None, "Of `rates`: refuse greater shares of unmatched rows or samples.  [default: 0.1]"
    ] = None
    entries: Annotated[Path | None, "Method text-balance: a list of entries, balanced as in MetaCLIP."] = None
    concepts: Annotated[str | None, "Method text-balance: lists of concepts, in place of `entries`."] = None
    per_entry: Annotated[int | None, "Method text-balance: t, samples per entry. MetaCLIP: 20000."] = None
    ignore_case: Annotated[bool, "Method text-balance: compare in lower case."] = False
    plurals: Annotated[bool, "Method text-balance: regular English plurals and singulars match too."] = False
    of: Annotated[str | None, "Methods between, within, mixture: the plan whose rates they start from."] = None
    shares: Annotated[
        str | Mapping[str, float] | None,
        "Method mixture: share of each group, such as laion=0.6,cc12m=0.4, or a .json file of them.",
    ] = None
    source: Annotated[
        str | None,
        "Method bundle: a folder that an export to plan-bundle wrote, here or at hf://datasets/….",
        "--from",
    ] = None
    strict: Annotated[
        float | None, "Of `source`, `rates`: refuse if a smaller share of the names or samples is in this pool."
    ] = None

    def __post_init__(self) -> None:
        """Set the method that the given file implies."""
        if not self.method:
            implied = {"rates": self.rates, "text-balance": self.entries or self.concepts, "bundle": self.source}
            method = next((name for name, given in implied.items() if given is not None), "")
            object.__setattr__(self, "method", method)


@dataclass(frozen=True)
class ExportRequest:
    """An export of a plan."""

    shard_samples: Annotated[int, "Shards: samples of each new one, or up to a few less."] = 10_000
    workers: Annotated[int | None, "Shards: processes; one a processor by default."] = None
    max_rejected: Annotated[float, "Shards: share of unreadable samples that may be left out."] = 0.01
    captions: Annotated[str | None, "Shards, urls: joined captions and their weights: recap:0.7,original:0.3."] = None
    licence: Annotated[str | None, "Plan-bundle: of your list of samples, such as cc-by-4.0, for its README."] = None
    limit: Annotated[int, "Embedding-atlas: samples, chosen by chance where the pool has more."] = 100_000
    projection: Annotated[str, "Embedding-atlas: pca, or umap (pip install umap-learn)."] = "pca"

    def __post_init__(self) -> None:
        caption_weights(self.captions)
        at_least(self, workers=1, shard_samples=1, limit=1)
        check_projection(self.projection)
        if not 0 <= self.max_rejected <= 1:
            raise UserError(f"`max_rejected` {self.max_rejected}: must lie in [0, 1]")
        if self.licence is not None and not re.fullmatch(r"[A-Za-z0-9.+-]+", self.licence):
            raise UserError(f"`licence` {self.licence!r}: give a short name, such as cc-by-4.0")


@dataclass(frozen=True)
class TrainRequest:
    """A training; None leaves it to the recipe, to the run that is resumed, or to the default."""

    epochs: Annotated[int | None, "Of the plan."] = None
    samples_seen: Annotated[
        int | str | Sequence[int] | None, "In place of epochs: in all, or of each phase of the recipe, with commas."
    ] = None
    checkpoint_every: Annotated[int | None, "Batches, at most.  [default: a twentieth, at most 1000 steps]"] = None
    resume: Annotated[bool, "Go on after the last checkpoint, if there is one."] = False
    seed: Annotated[int | None, "Of order, augmentations and weights.  [default: the plan's]"] = None
    lanes: Annotated[int | None, "Places of the pool that a batch is taken from.  [default: about 64]"] = None
    block: Annotated[int | None, "Samples of a lane that are shuffled together."] = None
    compose: Annotated[
        str | None,
        "shuffle, spread, diverse; by concepts: diverse:NAME, most-concepts:NAME.  [default: shuffle]",
    ] = None
    captions: Annotated[
        str | None, "Joined captions and their weights, such as recap:0.7,original:0.3.  [default: original]"
    ] = None
    check: Annotated[str, "Of the shards, before starting: none, size or index."] = "size"
    damaged: Annotated[str, "Shards that are missing, changed or fail: error or replace."] = "error"
    max_replaced: Annotated[float, "Share of samples that may be replaced."] = 0.01
    cache: Annotated[Path | None, "Folder for what is fetched from remote shards."] = None
    cache_size: Annotated[str, "Bound of the cache."] = "32GB"
    record: Annotated[Path | None, "Folder for a record of the rows and pixels of each batch."] = None

    def __post_init__(self) -> None:
        at_least(self, epochs=1, checkpoint_every=1, lanes=1, block=1)
        _ = self.lengths, caption_weights(self.captions)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the numbers of `samples_seen`: none, one for the whole training, or one for each phase."""
        given = self.samples_seen
        numbers = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given or ()
        try:
            lengths = tuple(map(int, numbers))
        except (TypeError, ValueError):
            lengths = (0,)
        if min(lengths, default=1) < 1:
            raise UserError(
                f"`samples_seen` {given}: give a whole number of at least 1, or one for each phase, such as 1280000000,128000000"
            )
        return lengths


@dataclass(frozen=True)
class ReportRequest:
    """A report on a catalog."""

    output: Annotated[Path, "Folder of the report; open index.html in it."] = field(kw_only=True)
    plan: Annotated[
        Sequence[str],
        "Plan to show; may be given again.  [default: all of the newest snapshot, else all, but those of comparisons]",
    ] = ()
    clustering: Annotated[
        str | None, "Clustering or grouping whose clusters are shown.  [default: that of the first plan, or main]"
    ] = None
    study: Annotated[Path | None, "Folder of a comparison, whose results are shown."] = None
    epochs: Annotated[int, "Epochs of the chart of coverage."] = 20
    samples_per_second: Annotated[float | None, "Speed of your training, for GPU-hours."] = None
    images: Annotated[int, "Samples of each kind (nearest, farthest, drawn, …) that a cluster shows."] = 3
    most_images: Annotated[int, "Bound on the thumbnails of all clusters."] = 10_000
    projection: Annotated[str, "Map of clusters: pca, or umap (pip install umap-learn)."] = "pca"

    def __post_init__(self) -> None:
        at_least(self, epochs=1, images=1, most_images=1)
        if self.samples_per_second is not None and not 0 < self.samples_per_second < math.inf:
            raise UserError(f"`samples_per_second` {self.samples_per_second}: must be a finite number above 0")
        check_projection(self.projection)


@dataclass(frozen=True)
class EvaluateRequest:
    """An evaluation of a checkpoint."""

    model: Annotated[str | None, "open_clip's name, or local-dir:FOLDER.  [default: the run's]"] = None
    classes: Annotated[Path | None, "Names of the classes, one a line.  [default: the set's]"] = None
    templates: Annotated[Path | None, "Prompts with {c}, one a line.  [default: the set's, else OpenAI's 80]"] = None
    train_counts: Annotated[
        Path | None, "CSV, TSV or JSON: how often each class was trained on; also bethgelab's search_counts."
    ] = None
    pool: Annotated[Path | None, "A catalog, in whose captions to count the classes instead."] = None
    concepts: Annotated[str | None, "Of `pool`: lists of concepts to count the classes in, in place of captions."] = (
        None
    )
    groups: Annotated[str, "Of classes: thirds, or bounds such as 100,20 (head above 100, few below 20)."] = "thirds"
    batch_size: Annotated[int, "Images, or fewer at the end of a shard."] = 256
    workers: Annotated[int | None, "Processes that decode; one a processor by default."] = None
    device: Annotated[str, "auto, cpu, cuda, …."] = "auto"
    precision: Annotated[str, "fp32 or bf16."] = "fp32"
    bootstrap: Annotated[int, "Replicates, for the intervals."] = 1000
    seed: Annotated[int, "Of the bootstrap."] = 0
    max_rejected: Annotated[float, "Stop when a greater share of a set's samples can't be read."] = MAX_REJECTED

    def __post_init__(self) -> None:
        at_least(self, workers=0, batch_size=1, bootstrap=1, seed=0)


def check_projection(name: str) -> None:
    """Raise a UserError if there is no projection of this name."""
    if name not in PROJECTIONS:
        raise UserError(f"`projection` {name!r}: use {' or '.join(PROJECTIONS)}")


def at_least(request: Any, **bounds: int) -> None:  # noqa: ANN401  (any request)
    """Raise a UserError if a field of a request is less than a bound; None is no value."""
    for name, bound in bounds.items():
        if (value := getattr(request, name)) is not None and value < bound:
            raise UserError(f"`{name}` {value}: must be at least {bound}")


@contextmanager
def as_given(names: Iterable[str]) -> Iterator[None]:
    """While this lasts, take the named fields of requests as given, even where they have their default."""
    token = _given.set(frozenset(names))
    try:
        yield
    finally:
        _given.reset(token)


def refuse_given(request: Any, idle: Collection[str], why: str) -> None:  # noqa: ANN401  (any request)
    """Raise a UserError if one of the fields `idle` of a request is given, or is not its default; `why` says why it does nothing."""
    for item in fields(request):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if item.name in idle and (item.name in _given.get() or getattr(request, item.name) not in (default, [])):
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


def caption_weights(given: str | Mapping[str, float] | None) -> dict[str, float]:
    """Return the share of each of several captions, which sum to 1; none if all draws use samples' own.

    `given` is a mapping, or a text such as recap:0.7,original:0.3. A UserError says what is wrong with it.
    """
    if not given:
        return {}
    pairs = (
        [item.partition(":") for item in given.split(",")]
        if isinstance(given, str)
        else [(*item,) for item in given.items()]
    )
    try:
        weights = {name.strip(): 1.0 if weight == "" else float(weight) for name, *_, weight in pairs}
    except (TypeError, ValueError, AttributeError):
        weights = {}
    if len(weights) < len(pairs) or not all(weights) or not all(0 < weight < math.inf for weight in weights.values()):
        raise UserError(
            f"`captions` {given}: give names and weights above 0, each name once, such as recap:0.7,original:0.3"
        )
    total = math.fsum(weights.values())
    shares = {name: weights[name] / total for name in sorted(weights)}
    return {} if list(shares) == ["original"] else shares


def numbers_of(parameter: str, texts: Sequence[str]) -> dict[str, float]:
    """Return texts NAME=VALUE as names and numbers; a UserError names the parameter."""
    pairs: dict[str, float] = {}
    for text in texts:
        name, _, value = map(str.strip, text.partition("="))
        if name in pairs:
            raise UserError(f"`{parameter}` {name} is given twice: give it once")
        try:
            pairs[name] = float(value)
        except ValueError as error:
            raise UserError(f"`{parameter}` {text!r}: give NAME=VALUE, with a number as value") from error
    return pairs
