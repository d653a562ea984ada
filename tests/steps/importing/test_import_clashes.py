"""Two pools with the same shard names and the same keys in one catalog."""

import itertools

import numpy as np
import pytest

from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.steps.importing.pool import import_pool

PART_ROWS = 4
STAGE = "image embeddings"


@pytest.fixture
def keys(tmp_path, make_pool, make_vectors, make_embeddings):
    """Pools a and b, with the same five keys, and each with embeddings of its own; the keys."""
    for seed, name in enumerate("ab"):
        keys = list(itertools.chain(*make_pool(tmp_path / name, [3, 2]).values()))
        make_embeddings(tmp_path / f"of {name}", make_vectors(keys, seed=seed), 2)
    return keys


def embeddings(catalog):
    return np.concatenate(catalog.embedding_parts("image", catalog.snapshot()))


@pytest.fixture
def expected(keys, make_vectors):
    """`expected(names)` → the rows that pools of these names have, one after the other; "-" has none."""

    def rows(names):
        stacked = []
        for name in names:
            vectors = make_vectors(keys, seed="ab".find(name) if name != "-" else 0)
            block = np.stack([vectors[key] / np.linalg.norm(vectors[key]) for key in keys])
            stacked.append(0 * block if name == "-" else block)
        return np.concatenate(stacked)

    return rows


def check(catalog, rows):
    np.testing.assert_allclose(embeddings(catalog), rows, atol=2e-3)


def test_embeddings_that_come_with_tars_belong_to_these(run, tmp_path, keys, expected):
    run(tmp_path / "a", tmp_path / "of a")
    catalog = run(tmp_path / "b", tmp_path / "of b").catalog
    check(catalog, expected("ab"))
    assert catalog.rejected() is None


@pytest.mark.parametrize("part_rows", [1, 100])
def test_though_the_first_pool_has_no_embeddings(run, tmp_path, keys, expected, part_rows):
    run(tmp_path / "a", part_rows=part_rows)
    catalog = run(tmp_path / "b", tmp_path / "of b", part_rows=part_rows).catalog
    check(catalog, expected("-b"))
    catalog = run(tmp_path / "a", tmp_path / "of a", part_rows=part_rows).catalog  # its tars named again
    check(catalog, expected("ab"))


def test_the_order_of_pools_makes_no_difference(run, tmp_path, keys, expected):
    run(tmp_path / "a")
    run(tmp_path / "b")
    run(tmp_path / "b", tmp_path / "of b")
    check(run(tmp_path / "a", tmp_path / "of a").catalog, expected("ab"))


def test_given_alone_they_are_ambiguous(run, tmp_path, keys, make_pool, make_vectors, make_embeddings, rejected_counts):
    run(tmp_path / "a")
    make_pool(tmp_path / "b", [1], first_shard=9)
    run(tmp_path / "b")
    vectors = make_vectors([*keys, "000090000"])
    catalog = run(make_embeddings(tmp_path / "both", vectors)).catalog
    assert embeddings(catalog).any(axis=1).tolist() == [False] * 10 + [True]
    assert rejected_counts(catalog)[STAGE, "ambiguous key"] == 5


def test_two_pools_in_one_command_are_ambiguous(run, tmp_path, keys):
    with pytest.raises(UserError, match="ambiguous key: 10"):
        run(tmp_path / "a", tmp_path / "b", tmp_path / "of a", tmp_path / "of b")


def test_embeddings_of_other_samples_are_no_news(run, tmp_path, keys, make_pool, make_vectors, make_embeddings):
    """A file that covers both: what belongs to shards that were not named is passed over, also where they lack it."""
    run(tmp_path / "a")
    make_pool(tmp_path / "c", [2], first_shard=7)
    folder = make_embeddings(tmp_path / "of all", make_vectors([*keys, "000070000", "000070001"]))
    catalog = run(tmp_path / "c", folder).catalog
    assert embeddings(catalog).any(axis=1).tolist() == [False] * 5 + [True] * 2
    assert {row["reason"] for row in catalog.rejected().to_pylist()} == {"sample without embedding"}


def test_a_lost_sample_does_not_give_its_embedding_to_a_namesake(run, tmp_path, keys, make_pool, expected):
    """b's first tar lost its last sample: the embedding of that key is not a's."""
    run(tmp_path / "a")
    make_pool(tmp_path / "b", [2])
    catalog = run(tmp_path / "b", tmp_path / "of b").catalog
    rows = expected("-b")
    check(catalog, np.delete(rows, 7, axis=0))


class Interrupted(BaseException):
    """Like KeyboardInterrupt."""


@pytest.mark.parametrize(
    ("step", "done"),
    [("indexing tars", 1), ("joining image keys", 1), ("image embeddings", 0), ("image embeddings", 1)],
)
def test_an_interrupted_join_keeps_to_its_tars(run, tmp_path, keys, tree_bytes, step, done):
    """The file begun with b stays b's, and the same command again makes the same bytes."""

    def track(items, description, total=None):
        for position, item in enumerate(items):
            if (description, position) == (step, done):
                raise Interrupted
            yield item

    for folder in ("catalog", "whole"):
        import_pool([str(tmp_path / "a")], tmp_path / folder, workers=1, part_rows=2)
    sources = [str(tmp_path / "b"), str(tmp_path / "of b")]
    whole = tree_bytes(import_pool(sources, tmp_path / "whole", workers=1, part_rows=2).catalog.folder)
    with pytest.raises(Interrupted):
        run(*sources, context=Context(track), part_rows=2)
    run(*sources, part_rows=2)
    assert tree_bytes(tmp_path / "catalog") == whole


def test_an_interrupted_join_that_goes_on_without_its_tars(run, tmp_path, keys, expected):
    run(tmp_path / "a")

    def track(items, description, total=None):
        for position, item in enumerate(items):
            if (description, position) == ("image embeddings", 1):
                raise Interrupted
            yield item

    with pytest.raises(Interrupted):
        run(tmp_path / "b", tmp_path / "of b", context=Context(track))
    check(run(tmp_path / "of b").catalog, expected("-b"))


def test_the_same_import_again_does_nothing(run, tmp_path, keys, tree_bytes):
    run(tmp_path / "a", tmp_path / "of a")
    catalog = run(tmp_path / "b", tmp_path / "of b").catalog
    before = tree_bytes(catalog.folder)
    for name in "ab":
        assert run(tmp_path / name, tmp_path / f"of {name}").columns == []
    assert tree_bytes(catalog.folder) == before
