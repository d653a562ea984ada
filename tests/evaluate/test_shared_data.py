"""Class names in the captions of the real pool, against its true counts."""

import csv

import numpy as np
import pytest

from tailwise.evaluate.counts import count_in_pool
from tailwise.steps.importing.pool import import_pool

pytestmark = pytest.mark.shared_data


def test_counts_in_captions_follow_the_true_ones(shared_data, tmp_path):
    pool = shared_data / "tinyimagenet-lt"
    import_pool([str(pool / "train")], tmp_path / "catalog")
    with (pool / "classes.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    names, true = [row["name"] for row in rows], np.array([int(row["train_count"]) for row in rows])
    found = count_in_pool(tmp_path / "catalog", names)
    ranks = [np.argsort(np.argsort(counts, kind="stable"), kind="stable") for counts in (true, found)]
    assert np.corrcoef(ranks)[0, 1] > 0.9
