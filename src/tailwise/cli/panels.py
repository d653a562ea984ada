"""Panels of --help: the commands by step of the work, and the options of commands that have many."""

from __future__ import annotations

import itertools
from typing import Any

# All commands, in the order of the work.
STEPS = {
    "Import": ("import", "captions", "concepts", "embed"),
    "Clean (drop lists)": ("dedup", "score", "filter"),
    "Group": ("cluster", "group"),
    "Plan": ("plan", "explain"),
    "Use a plan": ("draw", "prepare", "export", "train"),
    "Measure": ("evaluate", "compare"),
    "See": ("report", "status", "why", "excluded"),
    "Keep in order": ("remove", "verify", "relocate", "unpack", "delete", "rename"),
    "All steps at once": ("run", "baselines", "demo"),
}

# Of each command (or of `tailwise` itself): panel → options. All others stand in the panel "Options", which comes first.
OPTIONS = {
    "tailwise": {"Where work runs": "executor ray-address part skip-lost"},
    "import": {
        "Images and captions in shards": "image caption",
        "Embeddings that come with the pool": "embedding column of id-column embedding-column clustering",
    },
    "concepts": {
        "Entries of captions, and lists that agree": "entries plurals workers both",
    },
    "embed": {
        "Encoder": "model pooling",
        "Another column": "of captions",
        "Resources": "workers device precision backend batch-size",
    },
    "dedup": {
        "Identical images and evaluation sets": "exact against mirrored",
        "Comparison inside clusters": "clustering column probe rule order score seed extends",
        "Resources": "device max-memory",
    },
    "score": {
        "A file of scores": "file column match strict max-rejected",
        "A head on embeddings": "head activation image",
        "A mix of scores, and options of these": "mix without text captions target clustering norm batch-size repetitions temperature seed",
    },
    "filter": {
        "Rules": "min max keep keep-lowest rule missing",
        "A list made elsewhere": "only not refill",
        "Matching of a list, or a file of scores": "match strict file max-rejected",
        "Options of a score": "image text captions target clustering norm batch-size repetitions temperature seed",
    },
    "cluster": {"k-means": "iterations points-per-centroid seed force", "Resources": "device max-memory"},
    "group": {
        "By a column of a file": "file max-rejected",
        "By a list of entries": "ignore-case plurals max-misses allow-misses workers",
        "A list to begin with": "suggest terms output overwrite",
    },
    "plan": {
        "Quotas of groups": "per-cluster alpha alpha-end anneal-epochs temperature neighbours threshold class-balance min-per-cluster"
        " max-repeats above-one",
        "Choice of samples": "pick score score-file logits dynamic draw seed",
        "Method rates": "rates rate-column missing-rate max-rejected match",
        "Method text-balance": "entries concepts per-entry ignore-case plurals",
        "A bundle of another catalog": "from strict",
        "Methods mixture, between and within": "shares of",
        "Methods of your own": "methods option final-option",
    },
    "export": {
        "New shards": "workers max-rejected captions shard-samples",
        "Embedding Atlas": "limit projection",
        "Plan bundle": "licence",
    },
    "train": {
        "Order of the samples": "seed lanes block compose",
        "Shards": "check damaged max-replaced cache cache-size",
        "Checkpoints and records": "checkpoint-every record",
    },
    "evaluate": {
        "Classes and prompts": "classes templates",
        "By training frequency": "train-counts pool concepts groups",
        "Intervals": "bootstrap seed",
        "Resources": "batch-size workers device precision max-rejected",
    },
    "report": {"Size of the page": "images most-images"},
    "compare": {"A part of the runs": "only seeds"},
}


# The same, of all commands: option → panel.
PANELS = {
    command: {name: panel for panel, names in OPTIONS.get(command, {}).items() for name in names.split()}
    for command in ("tailwise", *itertools.chain(*STEPS.values()))
}


def into_panels(command: str, options: list[Any]) -> None:
    """Sort the options of a command, as the parser knows them, by panel, and name each one's panel."""
    panels = PANELS.get(command, {})
    order = [None, *panels.values()]
    for item in options:
        item.rich_help_panel = panels.get(item.opts[0].removeprefix("--"))
    options.sort(key=lambda item: order.index(item.rich_help_panel))
