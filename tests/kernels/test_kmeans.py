import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from tailwise.kernels import kmeans as kmeans_module
from tailwise.kernels import lloyd as lloyd_module
from tailwise.kernels import screening
from tailwise.kernels.assign import assign
from tailwise.kernels.grid import GRID, SIMILARITY_UNIT, to_grid, unit_rows_on_grid
from tailwise.kernels.keyed import stream_key
from tailwise.kernels.kmeans import chosen_rows, kmeans
from tailwise.kernels.products import is_sound
from tailwise.kernels.seeding import TooFewDistinctRowsError, seed_centroids

FIXED = settings(derandomize=True, deadline=None, max_examples=25)


def mean_cosine(x, centroids):
    return assign(x, centroids, device="cpu")[1].mean()


def lloyd_step(x, centroids):
    """One iteration in plain NumPy; sums of grid values are exact in float64."""
    labels, similarity = assign(x, centroids, device="cpu")
    rows = to_grid(x).astype(np.float64)
    updated = centroids.copy()
    for label in np.unique(labels[labels >= 0]):
        updated[label] = unit_rows_on_grid(rows[labels == label].sum(axis=0)[None])[0]
    return updated, np.rint(similarity[labels >= 0] / SIMILARITY_UNIT).mean() * SIMILARITY_UNIT


def seed_with(monkeypatch, centroids):
    monkeypatch.setattr(kmeans_module, "seed_centroids", lambda *_, **__: centroids.copy())


@pytest.fixture(scope="module")
def reference_fit(blobs):
    x = blobs(3000, 24, 40)
    x[[5, 1000]] = 0
    return x, kmeans(x, 50, iterations=4, seed=3, tolerance=-1.0, device="cpu", threads=1)


def assert_same_fit(result, expected):
    np.testing.assert_array_equal(result.centroids, expected.centroids)
    assert result.objective == expected.objective


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk_rows", [173, 1024, 16_384])
def test_chunks_and_threads_change_nothing(reference_fit, chunk_rows, threads):
    x, expected = reference_fit
    assert_same_fit(
        kmeans(x, 50, iterations=4, seed=3, tolerance=-1.0, device="cpu", threads=threads, chunk_rows=chunk_rows),
        expected,
    )


@pytest.mark.parametrize("seed", range(6))
def test_seeding_does_not_depend_on_the_products(unit_rows, products_by, seed):
    if not is_sound(torch.int8, *screening.INT8_TRIAL):
        pytest.skip("this processor, or this torch, has no exact int8 products")
    x, seeds = unit_rows(700, 48, seed=seed), []
    for precision in ("int8", "float32"):
        with products_by(precision):
            seeds.append(seed_centroids(x, 90, seed=seed, device="cpu"))
    np.testing.assert_array_equal(*seeds)


@pytest.fixture(scope="module")
def long_fit(blobs, products_by):
    """A fit that compares all rows with all centroids in every iteration, in float32."""
    x = blobs(6000, 32, 200, noise=0.5)
    x[[7, 2000]] = 0
    with pytest.MonkeyPatch.context() as patch, products_by("float32"):
        seed_with(patch, unit_rows_on_grid(x[100:250].astype(np.float64)))  # far from where it ends
        return x, kmeans(x, 150, iterations=14, seed=1, tolerance=-1.0, device="cpu", carry_bytes=0)


@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize("carried", [1000, 6000])
@pytest.mark.parametrize("coded", [0, 700])
def test_what_is_carried_changes_nothing(long_fit, monkeypatch, products_by, watched, precision, carried, coded):
    if precision == "int8" and not is_sound(torch.int8, *screening.INT8_TRIAL):
        pytest.skip("this processor, or this torch, has no exact int8 products")
    memory_for = screening.Coded.memory_for

    def full_of_rubbish(*arguments):
        made = memory_for(*arguments)
        made.codes.fill_(77)
        return made

    monkeypatch.setattr(screening.Coded, "memory_for", full_of_rubbish)
    x, expected = long_fit
    seed_with(monkeypatch, unit_rows_on_grid(x[100:250].astype(np.float64)))
    carry = carried * lloyd_module.LISTED_BYTES + coded * (lloyd_module.CODED_BYTES + x.shape[1])
    # Lists are made as soon as there is a drift, and every centroid but the slowest half may be a mover: that all is used, and often.
    monkeypatch.setattr(lloyd_module, "LIST_REACH", 2.0)
    for name in ("RECHECKING", "CODING"):
        monkeypatch.setattr(lloyd_module, name, 1)
    options = {"tolerance": -1.0, "device": "cpu", "chunk_rows": 1700, "carry_bytes": carry, "threads": 2}
    recheck, move = (watched(lloyd_module, name) for name in ("recheck", "decide_movers"))
    with products_by(precision), recheck as rechecks, move as movers:
        fit = kmeans(x, 150, iterations=14, seed=1, **options)
    assert_same_fit(fit, expected)
    assert min(len(rechecks), len(movers)) > 5


@pytest.mark.parametrize("cuts", [[1500], [1, 2, 3], [0, 0, 2999, 3000], list(range(100, 3000, 100))])
def test_blocks_change_nothing(reference_fit, cuts):
    x, expected = reference_fit
    blocks = np.split(x, cuts)
    assert_same_fit(kmeans(blocks, 50, iterations=4, seed=3, tolerance=-1.0, device="cpu", chunk_rows=333), expected)


def test_memory_mapped_blocks_change_nothing(reference_fit, tmp_path):
    x, expected = reference_fit
    for part, rows in enumerate(np.split(x, [1000, 1700])):
        np.save(tmp_path / f"{part}.npy", rows)
    blocks = [np.load(tmp_path / f"{part}.npy", mmap_mode="r") for part in range(3)]
    assert_same_fit(kmeans(blocks, 50, iterations=4, seed=3, tolerance=-1.0, device="cpu", chunk_rows=500), expected)


def test_the_device_path_changes_nothing(reference_fit, products_by):
    x, expected = reference_fit
    with products_by("device"):
        assert_same_fit(kmeans(x, 50, iterations=4, seed=3, tolerance=-1.0, device="cpu"), expected)


def test_rows_of_the_grid_give_the_same_in_float16_and_float32(reference_fit):
    x, expected = reference_fit
    assert_same_fit(kmeans(x.astype(np.float32), 50, iterations=4, seed=3, tolerance=-1.0, device="cpu"), expected)


def test_each_iteration_is_a_lloyd_step(blobs, monkeypatch):
    x = blobs(1000, 12, 10)
    x[17] = 0
    seed_with(monkeypatch, unit_rows_on_grid(x[1:9].astype(np.float64)))
    centroids, objective = unit_rows_on_grid(x[1:9].astype(np.float64)), []
    for iterations in range(1, 5):
        fit = kmeans(x, 8, iterations=iterations, tolerance=-1.0, device="cpu")
        centroids, mean = lloyd_step(x, centroids)
        objective.append(mean)
        np.testing.assert_array_equal(fit.centroids, centroids)
        np.testing.assert_allclose(fit.objective, objective, rtol=0, atol=1e-15)


@FIXED
@given(st.integers(30, 400), st.integers(2, 20), st.integers(1, 12), st.integers(0, 2**32))
def test_the_objective_never_falls(blobs, count, dimension, k, seed):
    x = blobs(count, dimension, 9, seed=seed % 1000, noise=1.0, dtype=np.float32)
    fit = kmeans(x, k, iterations=12, seed=seed, tolerance=-1.0, device="cpu")
    assert len(fit.objective) == 12
    assert fit.centroids.shape == (k, dimension)
    assert fit.centroids.dtype == np.float32
    steps = fit.centroids.astype(np.float64) / GRID
    np.testing.assert_array_equal(steps, np.rint(steps))
    np.testing.assert_allclose(np.linalg.norm(fit.centroids.astype(np.float64), axis=1), 1, atol=1e-6)
    labels, _ = assign(x, fit.centroids, device="cpu")
    emptied = np.bincount(labels, minlength=k).min() == 0
    falls = -np.diff([*fit.objective, mean_cosine(x, fit.centroids)])
    # Centroids are rounded to the grid, and a cluster that was emptied takes half of another one.
    assert falls.max() < (1e-4 if emptied else 1e-6)


def test_the_fit_beats_its_seeding_and_random_rows(blobs):
    x = blobs(4000, 32, 60, noise=0.4)
    fit = kmeans(x, 60, iterations=15, device="cpu")
    assert mean_cosine(x, fit.centroids) > fit.objective[0]
    rng = np.random.default_rng(0)
    for _ in range(5):
        picked = unit_rows_on_grid(x[rng.choice(len(x), 60, replace=False)].astype(np.float64))
        assert fit.objective[0] > mean_cosine(x, picked), "seeding must beat random rows"
        for _ in range(15):
            picked, _ = lloyd_step(x, picked)
        assert mean_cosine(x, fit.centroids) > mean_cosine(x, picked), "and so must the fit, after as many iterations"


def mean_objectives(x, k, init):
    """Final mean cosine, ours and scikit-learn's, averaged over three seeds."""
    ours, theirs = [], []
    for seed in range(3):
        ours.append(mean_cosine(x, kmeans(x, k, iterations=20, seed=seed, tolerance=0, device="cpu").centroids))
        peer = KMeans(k, init=init, n_init=1, max_iter=20, random_state=seed).fit(x)
        theirs.append(mean_cosine(x, unit_rows_on_grid(peer.cluster_centers_)))
    return np.mean(ours), np.mean(theirs)


@pytest.mark.parametrize(
    ("count", "dimension", "k", "noise"), [(3000, 16, 20, 0.8), (4000, 32, 64, 0.8), (2000, 8, 30, 1.0)]
)
def test_the_objective_is_within_a_hundredth_of_scikit_learns(blobs, count, dimension, k, noise):
    ours, theirs = mean_objectives(blobs(count, dimension, k, seed=1, noise=noise, dtype=np.float32), k, "k-means++")
    assert ours > 0.99 * theirs


@pytest.mark.parametrize("noise", [0.4, 0.8])
def test_the_objective_is_above_that_of_scikit_learn_from_random_rows(blobs, noise):
    ours, theirs = mean_objectives(blobs(4000, 32, 64, seed=1, noise=noise, dtype=np.float32), 64, "random")
    assert ours > theirs


def test_well_separated_clusters_are_found(blobs):
    centres = unit_rows_on_grid(np.eye(12))
    rng = np.random.default_rng(0)
    truth = rng.choice(12, 2000, p=np.array([0.6] + [0.4 / 11] * 11))
    x = unit_rows_on_grid(centres[truth] + 0.02 * rng.standard_normal((2000, 12)))
    labels, _ = assign(x, kmeans(x, 12, device="cpu").centroids, device="cpu")
    assert len(set(zip(truth.tolist(), labels.tolist(), strict=True))) == 12


def test_one_cluster_is_the_mean_direction(blobs):
    x = blobs(500, 10, 3)
    expected = unit_rows_on_grid(x.astype(np.float64).sum(axis=0)[None])
    np.testing.assert_array_equal(kmeans(x, 1, device="cpu").centroids, expected)


def test_as_many_clusters_as_rows(unit_rows):
    x = unit_rows(40, 16, dtype=np.float32)
    fit = kmeans(x, 40, device="cpu")
    assert fit.objective[0] == pytest.approx(1, abs=1e-6)
    assert len(set(assign(x, fit.centroids, device="cpu")[0])) == 40


def test_rows_of_zeros_are_left_out(blobs, monkeypatch):
    x = blobs(600, 8, 5)
    start = unit_rows_on_grid(x[:6].astype(np.float64))
    with_zeros = np.insert(x, [0, 10, 10, 600], 0, axis=0)
    assert len(with_zeros) == 604
    seed_with(monkeypatch, start)
    assert_same_fit(kmeans(with_zeros, 6, device="cpu"), kmeans(x, 6, device="cpu"))


def test_rows_of_zeros_are_never_seeds(unit_rows):
    x = np.zeros((400, 8), np.float16)
    x[::4] = unit_rows(100, 8)
    for seed in range(10):
        fit = kmeans(x, 20, seed=seed, iterations=1, device="cpu")
        assert fit.centroids.any(axis=1).all()


@pytest.mark.parametrize(("distinct", "k"), [(1, 2), (5, 6), (5, 400)])
def test_too_few_distinct_rows(unit_rows, distinct, k):
    x = np.repeat(unit_rows(distinct, 12), 100, axis=0)
    with pytest.raises(TooFewDistinctRowsError, match=f"only {distinct} distinct rows for {k} centroids") as caught:
        kmeans(x, k, device="cpu")
    assert caught.value.distinct == distinct
    assert isinstance(caught.value, ValueError)


def test_enough_distinct_rows(unit_rows):
    x = np.repeat(unit_rows(5, 12), 100, axis=0)
    fit = kmeans(x, 5, device="cpu")
    assert fit.objective[-1] == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("x", [np.zeros((50, 4), np.float16), np.empty((0, 4), np.float16), []])
def test_no_rows_at_all(x):
    with pytest.raises(TooFewDistinctRowsError, match="only 0 distinct rows for 3 centroids"):
        kmeans(x, 3, device="cpu")


@pytest.mark.parametrize("k", [0, -1])
def test_no_clusters_are_refused(unit_rows, k):
    with pytest.raises(ValueError, match=f"k = {k}: must be at least 1"):
        kmeans(unit_rows(10, 4), k, device="cpu")


def test_rows_that_are_not_normalised_are_refused(unit_rows):
    x = unit_rows(100, 4, dtype=np.float32)
    x[60] *= 2
    with pytest.raises(ValueError, match="normalise the rows first"):
        kmeans(x, 3, device="cpu")


def test_empty_clusters_take_half_of_the_largest(monkeypatch):
    """Three bad seeds attract nobody; all rows start in one cluster."""
    rng = np.random.default_rng(0)
    middle = np.array([[1, 0.3, 0, 0], [1, -0.3, 0, 0], [1, 0, 0.3, 0], [1, 0, -0.3, 0]])
    x = unit_rows_on_grid(middle[rng.integers(0, 4, 800)] + 0.01 * rng.standard_normal((800, 4)))
    start = unit_rows_on_grid(np.array([[1, 0, 0, 0], [-1, 0, 0, 0.1], [-1, 0, 0.1, 0], [-1, 0.1, 0, 0]]))
    seed_with(monkeypatch, start)
    assert set(assign(x, start, device="cpu")[0]) == {0}
    fit = kmeans(x, 4, iterations=20, tolerance=-1.0, device="cpu")
    assert np.bincount(assign(x, fit.centroids, device="cpu")[0], minlength=4).min() > 100
    assert fit.objective[-1] > 0.999


def test_several_empty_clusters_halve_the_largest_ones_one_each(blobs, monkeypatch):
    x = blobs(2000, 8, 6, noise=0.6)
    good = kmeans(x, 6, seed=1, device="cpu").centroids
    away = unit_rows_on_grid(-x[:3].astype(np.float64).mean(axis=0)[None] + 1e-3 * np.eye(8)[:3])
    before, _ = assign(x, good, device="cpu")
    start = np.concatenate([good, away])
    assert assign(x, start, device="cpu")[0].max() <= 5
    seed_with(monkeypatch, start)
    fit = kmeans(x, 9, iterations=1, device="cpu")
    largest = np.argsort(-np.bincount(before, minlength=6), kind="stable")[:3]
    others = np.setdiff1d(np.arange(6), largest)
    expected, _ = lloyd_step(x, good)
    np.testing.assert_array_equal(fit.centroids[others], expected[others])
    for half, donor in zip((6, 7, 8), largest, strict=True):
        for part in (half, donor):
            assert 0 < np.abs(fit.centroids[part] - expected[donor]).max() < 2e-3
        assert not np.array_equal(fit.centroids[half], fit.centroids[donor])


def test_single_rows_are_not_halved(monkeypatch):
    x = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    start = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    seed_with(monkeypatch, start)
    np.testing.assert_array_equal(kmeans(x, 3, iterations=3, device="cpu").centroids, start)


def test_a_cluster_whose_rows_cancel_keeps_its_centroid(monkeypatch):
    x = np.array([[0, 1], [0, -1]], np.float32)
    start = np.array([[1, 0]], np.float32)
    seed_with(monkeypatch, start)
    np.testing.assert_array_equal(kmeans(x, 1, iterations=3, device="cpu").centroids, start)


def test_it_stops_when_nothing_is_gained(blobs):
    x = blobs(800, 8, 4, noise=0.1)
    fit = kmeans(x, 4, iterations=100, tolerance=1e-6, device="cpu")
    gains = np.diff(fit.objective)
    assert len(fit.objective) < 100
    assert gains[-1] < 1e-6
    assert (gains[:-1] >= 1e-6).all()


def test_progress_is_reported(blobs):
    calls = []
    fit = kmeans(
        blobs(300, 4, 3), 3, iterations=4, tolerance=-1.0, device="cpu", on_iteration=lambda *call: calls.append(call)
    )
    assert calls == list(enumerate(fit.objective, start=1))


def test_the_seed_decides(blobs):
    x = blobs(500, 8, 20, noise=1.0)
    first, again, other = (kmeans(x, 8, seed=seed, iterations=2, device="cpu").centroids for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_seeds_are_distinct_rows(unit_rows):
    x = np.repeat(unit_rows(30, 16, dtype=np.float32), 4, axis=0)
    for seed in range(5):
        seeds = seed_centroids(x, 30, seed=seed, device="cpu")
        labels, similarity = assign(unit_rows(30, 16, dtype=np.float32), seeds, device="cpu")
        assert sorted(labels) == list(range(30))
        assert (similarity > 1 - 1e-6).all()


def test_seeds_are_drawn_in_proportion_to_distance():
    """Two tight clusters of 990 and 10 rows: the second seed falls in the far one, however small."""
    rng = np.random.default_rng(0)
    middle = np.repeat([[1.0, 0, 0], [0, 1, 0]], [990, 10], axis=0)
    x = unit_rows_on_grid(middle + 1e-3 * rng.standard_normal((1000, 3)))
    for seed in range(20):
        assert set(assign(x, seed_centroids(x, 2, seed=seed, device="cpu"), device="cpu")[0][[0, -1]]) == {0, 1}


@FIXED
@given(st.integers(0, 20_000), st.floats(0.001, 0.9), st.integers(0, 2**32))
def test_rows_are_chosen_by_their_index_alone(cut, share, seed):
    key = stream_key(seed, "test")
    whole = chosen_rows(0, 20_000, share, key)
    assert whole.dtype == np.bool_
    parts = chosen_rows(0, cut, share, key), chosen_rows(cut, 20_000 - cut, share, key)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert abs(whole.sum() - 20_000 * share) < 5 * np.sqrt(20_000 * share * (1 - share))


@pytest.mark.parametrize("share", [1.0, 1.5, 300.0])
def test_all_rows_are_chosen(share):
    assert chosen_rows(0, 100_000, share, stream_key(0, "test")).all()


def test_golden_fit():
    """Clusters of another release must be the same, or say so in the changelog."""
    angles = np.array([0, 1, 2, 40, 41, 120, 121, 122, 123, 200])
    x = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1).astype(np.float16)
    fit = kmeans(x, 4, seed=0, device="cpu")
    expected = [[-15764843, -5739747], [16774660, 292867], [-8764879, 14305659], [12758428, 10894838]]
    assert np.rint(fit.centroids.astype(np.float64) / GRID).astype(int).tolist() == expected


@pytest.mark.gpu
@pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="needs a CUDA device")
def test_cuda_gives_the_same_bits_as_the_cpu(blobs):
    x = blobs(20_000, 96, 100)
    fits = (kmeans(x, 150, iterations=5, seed=2, tolerance=-1.0, device=device) for device in ("cuda", "cpu"))
    assert_same_fit(*fits)


def test_distinct_rows_are_counted_among_all():
    """A sample that is seeded from may have too few where nearly all rows are copies."""
    random = np.random.default_rng(0)
    x = np.zeros((30_000, 16), np.float32)
    x[:, 0] = 1
    x[random.permutation(30_000)[:3000]] = unit_rows_on_grid(random.normal(size=(3000, 16)))
    assert len(np.unique(kmeans(x, 2500, iterations=1, device="cpu").centroids, axis=0)) == 2500
    with pytest.raises(TooFewDistinctRowsError, match="only 3001 distinct rows for 3200"):
        kmeans(x, 3200, device="cpu")


@pytest.mark.parametrize("seed", [22, 26, 40])
def test_no_centroid_is_zero(seed):
    """Neither where rows differ by their length alone, nor where they cancel out."""
    scaled = np.zeros((129, 64), np.float16)
    scaled[:81, 0] = 1 + np.arange(-40, 41) / 1024
    scaled[np.arange(81, 129), np.arange(1, 49)] = 1
    assert seed_centroids(scaled, 49, seed=seed, device="cpu").any(axis=1).all()
    with pytest.raises(TooFewDistinctRowsError, match="only 49 distinct"):
        seed_centroids(scaled, 52, seed=seed, device="cpu")
    opposite = np.float32([[1, 0, 0], [-1, 0, 0]])
    assert kmeans(opposite, 1, seed=seed, device="cpu").centroids.any()
    alike = np.full((40, 700), 700**-0.5, np.float16)
    with pytest.raises(TooFewDistinctRowsError, match="only 1 distinct"):
        kmeans(alike, 5, seed=seed, device="cpu")


def test_sums_are_exact_beyond_53_bits():
    """Those of more than 2²⁹ rows: float64 would round them, and depend on the order."""
    row, before, label = (
        unit_rows_on_grid(np.array([[1.0, 3.0, -2.0]])),
        np.array([-1], np.int32),
        np.zeros(1, np.int32),
    )
    whole = [int(number) for number in np.rint(row[0].astype(np.float64) / GRID)]
    sums = lloyd_module.Sums(1, 3)
    sums.rows[0] = [number << 31 for number in whole]
    for _ in range(3):
        sums.move(row, before, label)
    assert sums.rows[0].tolist() == [(number << 31) + 3 * number for number in whole]
    sums.move(row, label, before)
    assert sums.rows[0].tolist() == [(number << 31) + 2 * number for number in whole]
    centroids, _ = lloyd_module.finish(lloyd_module.Partial(sums.rows, sums.sizes, 0), np.zeros((1, 3), np.float32))
    np.testing.assert_allclose(centroids, row, atol=2 * GRID)
