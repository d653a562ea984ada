"""Figures against plain loops; intervals against a bootstrap that really draws images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tailwise.evaluate import metrics


def plain_figures(labels, guesses, classes):
    right = [guess[0] == label for label, guess in zip(labels, guesses, strict=True)]
    near = [label in guess for label, guess in zip(labels, guesses, strict=True)]
    of_class = [
        [hit for hit, label in zip(right, labels, strict=True) if label == c] for c in range(classes) if c in labels
    ]
    return np.mean(right), np.mean(near), np.mean([np.mean(hits) for hits in of_class])


def draw(seed, images, classes):
    random = np.random.default_rng(seed)
    labels = random.choice(classes, images, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    guesses = np.stack([random.permutation(classes)[:5] for _ in range(images)])
    guesses[::2, 0] = np.where(random.random(len(guesses[::2])) < 0.7, labels[::2], guesses[::2, 0])
    for row in guesses:  # no class twice
        if row[0] in row[1:]:
            row[1:] = [c for c in range(classes) if c != row[0]][:4]
    return labels, guesses


@pytest.mark.parametrize("seed", range(6))
def test_slope_and_correlation_are_those_of_scipy(seed):
    random = np.random.default_rng(seed)
    images, counts = random.integers(0, 9, 30), random.choice([0, 1, 2, 3, 40, 5_000, 10**9], 30)
    right = random.binomial(images, 0.5)
    cells = np.stack([right, 0 * images, images - right], axis=1)
    found = metrics.classification(cells, {}, counts, replicates=200, seed=seed)
    there = images > 0
    line = stats.linregress(np.log2(np.maximum(counts, 1))[there], right[there] / images[there])
    assert found["slope"]["value"] == pytest.approx(line.slope, abs=1e-12)
    assert found["correlation"]["value"] == pytest.approx(line.rvalue, abs=1e-12)
    for name in ("slope", "correlation"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    assert "slope" not in metrics.classification(cells, {}, replicates=10)


def test_no_slope_where_frequencies_or_accuracies_do_not_differ():
    cells = np.array([[3, 0, 1], [1, 0, 3]])
    same = metrics.classification(cells, {}, np.array([7, 7]), replicates=20)
    assert same["slope"]["value"] is same["correlation"]["value"] is None
    flat = metrics.classification(np.array([[4, 0, 0], [8, 0, 0]]), {}, np.array([1, 4]), replicates=20)
    no_share = {"value": 0.0, "low": None, "high": None}  # no interval in place of one without width
    assert flat["slope"] == no_share
    assert flat["correlation"]["value"] is None
    assert metrics.classification(0 * cells, {}, np.array([7, 9]), replicates=20)["slope"]["value"] is None


@pytest.mark.parametrize("seed", range(4))
def test_values_are_those_of_plain_loops(seed):
    labels, guesses = draw(seed, 157, 9)
    cells = metrics.tally(labels, guesses, 9)
    found = metrics.classification(cells, {"some": np.array([1, 4])}, replicates=10)
    top1, top5, mean = plain_figures(labels, guesses, 9)
    assert [found[name]["value"] for name in ("top1", "top5", "mean_per_class")] == pytest.approx(
        [top1, top5, mean], abs=1e-15
    )
    some = [np.mean(guesses[labels == c, 0] == c) for c in (1, 4)]
    assert found["some"]["value"] == pytest.approx(np.mean(some))


def test_intervals_are_those_of_a_bootstrap_that_draws_images():
    labels, guesses = draw(1, 120, 6)
    random = np.random.default_rng(0)
    drawn = [random.integers(0, 120, 120) for _ in range(1000)]
    plain = np.array([plain_figures(labels[rows], guesses[rows], 6) for rows in drawn])
    found = metrics.classification(metrics.tally(labels, guesses, 6), {}, replicates=4000, seed=5)
    for at, name in enumerate(("top1", "top5", "mean_per_class")):
        low, high = np.quantile(plain[:, at], [0.025, 0.975])
        assert found[name]["low"] == pytest.approx(low, abs=0.02)
        assert found[name]["high"] == pytest.approx(high, abs=0.02)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(*[st.integers(0, 30)] * 3), min_size=1, max_size=12), st.integers(0, 5))
def test_an_interval_holds_the_value_and_lies_in_0_to_1(rows, seed):
    cells = np.array(rows, np.int64)
    found = metrics.classification(cells, {"first": np.array([0])}, replicates=200, seed=seed)
    for name, figure in found.items():
        if cells.sum() == 0 or (name == "first" and cells[0].sum() == 0):
            assert set(figure.values()) == {None}
        else:
            assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
            assert figure["low"] < figure["high"]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(*[st.integers(1, 20)] * 3), min_size=2, max_size=8), st.integers(0, 5))
def test_an_interval_shrinks_with_the_images(rows, seed):
    cells = np.array(rows, np.int64)
    few, many = (metrics.classification(cells * factor, {}, replicates=300, seed=seed) for factor in (1, 25))
    for name in ("top1", "top5", "mean_per_class"):
        assert many[name]["value"] == pytest.approx(few[name]["value"])
        width = {key: figure[name]["high"] - figure[name]["low"] for key, figure in (("few", few), ("many", many))}
        assert width["many"] < 0.5 * width["few"]  # a fifth, but for chance


def test_chunks_and_empty_classes_change_nothing(monkeypatch):
    cells = np.random.default_rng(0).integers(0, 9, (7, 3))
    group = {"a": np.array([0, 3, 4])}
    whole = metrics.classification(cells, group, replicates=50)
    monkeypatch.setattr(metrics, "_CHUNK_CELLS", 64)
    assert metrics.classification(cells, group, replicates=50) == whole
    more = metrics.classification(np.vstack([cells, np.zeros((2, 3), np.int64)]), group, replicates=50)
    assert all(more[name] == pytest.approx(figure, abs=1e-15) for name, figure in whole.items())
    assert metrics.classification(cells, group, replicates=50, seed=1) != whole


def test_where_all_replicates_are_equal_the_interval_is_wilsons():
    """Of SciPy, with n images; of a mean over classes, with C² / Σ (1 / n_c)."""
    for right, wrong in ((14, 0), (0, 20), (0, 1)):
        wilson = stats.binomtest(right, right + wrong).proportion_ci(method="wilson")
        found = metrics.classification(np.array([[right, 0, wrong]]), {"few": np.array([0])}, replicates=100)
        for name in ("top1", "top5", "mean_per_class", "few"):
            assert (found[name]["low"], found[name]["high"]) == pytest.approx((wilson.low, wilson.high), abs=1e-12)
    sure = metrics.classification(np.array([[30, 0, 0], [0, 0, 60], [0, 0, 0]]), {}, replicates=100)["mean_per_class"]
    wilson = stats.binomtest(40, 80).proportion_ci(method="wilson")  # 2² / (1/30 + 1/60) = 80
    assert tuple(sure.values()) == pytest.approx((0.5, wilson.low, wilson.high))


def test_the_effective_number_of_images_gives_the_variance_of_the_mean_over_classes():
    images, share = np.array([4, 9, 25, 0, 2]), 0.3
    drawn = np.random.default_rng(0).binomial(images, share, (200_000, 5))[:, images > 0] / images[images > 0]
    assert share * (1 - share) / metrics._effective(images) == pytest.approx(drawn.mean(axis=1).var(), rel=0.02)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 3000), min_size=3, max_size=60))
def test_groups_and_bins_part_the_classes(counts):
    counts = np.array(counts, np.int64)
    thirds = metrics.thirds(counts)
    sizes = [len(group) for group in thirds.values()]
    assert list(thirds) == ["head", "medium", "few"]
    assert sorted(sizes, reverse=True) == sizes and sizes[0] - sizes[-1] <= 1
    assert counts[thirds["head"]].min() >= counts[thirds["medium"]].max() >= counts[thirds["medium"]].min()
    assert counts[thirds["medium"]].min() >= counts[thirds["few"]].max()
    bounded = metrics.bounded(counts, 100, 20)
    assert all(
        (name == "head") == (counts[c] > 100) and (name == "few") == (counts[c] < 20)
        for name, group in bounded.items()
        for c in group
    )
    bins = metrics.doublings(counts)
    for parts in (thirds.values(), bounded.values(), [classes for _, _, classes in bins]):
        assert sorted(np.concatenate(list(parts)).tolist()) == list(range(len(counts)))
    for least, greatest, classes in bins:
        assert ((counts[classes] >= least) & (counts[classes] <= greatest)).all()
        assert greatest == max(0, 2 * least - 1)


def test_bounds_belong_to_the_middle():
    groups = metrics.bounded(np.array([101, 100, 20, 19]), 100, 20)
    assert {name: group.tolist() for name, group in groups.items()} == {"head": [0], "medium": [1, 2], "few": [3]}


def test_equal_counts_are_parted_by_class_index():
    assert [part.tolist() for part in metrics.thirds(np.array([5, 5, 5, 5, 9])).values()] == [[0, 4], [1, 2], [3]]


def test_recall_is_over_images_and_over_texts():
    texts = np.array([2, 1, 3])
    found_texts = np.array([[True, True], [False, True], [False, False]])
    found_images = np.array([[1, 2], [0, 1], [0, 2]])
    found = metrics.recall(found_texts, found_images, texts, (1, 5), replicates=200, seed=0)
    assert found["text_retrieval@1"]["value"] == pytest.approx(1 / 3)
    assert found["text_retrieval@5"]["value"] == pytest.approx(2 / 3)
    assert found["image_retrieval@1"]["value"] == pytest.approx(1 / 6)
    assert found["image_retrieval@5"]["value"] == pytest.approx(5 / 6)
    assert found["mean_recall@1"]["value"] == pytest.approx((1 / 3 + 1 / 6) / 2)
    for figure in found.values():
        assert figure["low"] <= figure["value"] <= figure["high"]


def test_recall_without_a_hit_has_wilsons_interval_of_images_weighed_by_texts():
    none = {"found_texts": np.zeros((20, 1), np.bool_), "found_images": np.zeros((20, 1), np.int64)}
    found = metrics.recall(**none, texts=np.array([1, 3] * 10), ks=(1,), replicates=50, seed=0)
    upper = {n: stats.binomtest(0, n).proportion_ci(method="wilson").high for n in (16, 20)}
    assert found["text_retrieval@1"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(upper[20])}
    assert found["image_retrieval@1"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(upper[16])}  # 40² / 100
    assert upper[20] < found["mean_recall@1"]["high"] < upper[16]


def test_the_recall_interval_is_that_of_drawn_images():
    random = np.random.default_rng(2)
    texts = random.integers(1, 6, 150)
    found_images = (random.random(150) * (texts + 1)).astype(np.int64)[:, None]
    found_texts = random.random((150, 1)) < 0.3
    rows = [random.integers(0, 150, 150) for _ in range(4000)]
    plain = [found_images[row].sum() / texts[row].sum() for row in rows]
    found = metrics.recall(found_texts, found_images, texts, (1,), replicates=4000, seed=0)["image_retrieval@1"]
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.01)
