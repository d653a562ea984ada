"""Typical words of clusters: words of their captions by tf-idf, a cluster being a document.

Words are runs of letters and digits, in lower case, of 2 to 24 characters. A script without spaces gives whole runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

CAPTIONS = 1_000_000  # that are looked at, about; they and their words bound the memory
WORDS = 8  # of a cluster
LETTERS = 24  # of a word, at most


def count_words(captions: pa.ChunkedArray, clusters: npt.NDArray[np.int32]) -> pa.Table:
    """Return word (dictionary), cluster (int32) and captions (int64): how many captions of a cluster have a word.

    `clusters`, int32 [n], are those of the captions.
    """
    lists = pc.split_pattern_regex(pc.utf8_lower(captions), r"[^\p{L}\p{N}]+").combine_chunks()
    words = pc.list_flatten(lists).dictionary_encode()
    vocabulary = words.dictionary
    lengths = pc.utf8_length(vocabulary).to_numpy(zero_copy_only=False)
    number = pc.match_substring_regex(vocabulary, r"^\p{N}+$").to_numpy(zero_copy_only=False)
    fit = ((lengths >= 2) & (lengths <= LETTERS) & ~number)[words.indices.to_numpy()]
    parents, indices = pc.list_parent_indices(lists).to_numpy()[fit], words.indices.to_numpy()[fit]
    caption, word = np.divmod(np.unique(parents * np.int64(len(vocabulary) + 1) + indices), len(vocabulary) + 1)
    pairs, counts = np.unique(word * (np.int64(1) << 32) + clusters[caption], return_counts=True)
    word, cluster = np.divmod(pairs, np.int64(1) << 32)
    texts = pa.DictionaryArray.from_arrays(pa.array(word, pa.int32()), vocabulary)
    return pa.table({"word": texts, "cluster": pa.array(cluster, pa.int32()), "captions": counts})


def typical_words(tables: Sequence[pa.Table], clusters: int) -> list[str]:
    """Return the WORDS most typical words of each cluster, separated by spaces, from the tables of `count_words` of all parts."""
    if not tables:
        return [""] * clusters
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    words = table.column("word").chunk(0) if len(table) else pa.array([""]).dictionary_encode()[:0]
    texts = words.dictionary.to_pylist()
    rank = np.empty(len(texts), np.int64)  # of equal scores, by text: the order of parts decides nothing
    rank[np.argsort(np.array(texts, object), kind="stable")] = np.arange(len(texts))
    pairs = words.indices.to_numpy().astype(np.int64) * clusters + table.column("cluster").to_numpy()
    pairs, at = np.unique(pairs, return_inverse=True)
    captions = np.bincount(at, table.column("captions").to_numpy(), len(pairs))
    word, cluster = np.divmod(pairs, max(clusters, 1))
    holders = np.bincount(word, minlength=len(texts))
    score = captions * np.log((1 + clusters) / holders[word])
    order = np.lexsort((rank[word], -score, cluster))
    word = word[order]
    bounds = np.searchsorted(cluster[order], np.arange(clusters + 1)).tolist()
    return [
        " ".join(texts[at] for at in word[start : min(stop, start + WORDS)].tolist())
        for start, stop in pairwise(bounds)
    ]
