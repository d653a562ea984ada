import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.kernels import duplicates, screening, similarity
from tailwise.kernels import similarity as similarity_module
from tailwise.kernels.duplicates import duplicate_pairs, duplicate_threshold, greedy
from tailwise.kernels.products import is_sound
from tailwise.kernels.similarity import (
    BELOW_ONE,
    NOTHING_EARLIER,
    first_of_identical,
    most_similar_earlier,
    similar_pairs,
)

FIXED = settings(derandomize=True, deadline=None, max_examples=150)
EPSILONS = (0.0, 1e-6, 0.001, 0.02, 0.1, 0.3, 0.6, 1.0)


def similarities(x, y=None):
    """The plain matrix: exact dot products over exact norms, 1 for identical rows alone."""
    y = x if y is None else y
    left, right = x.astype(np.float64), y.astype(np.float64)
    norms = np.sqrt((left**2).sum(1))[:, None] * np.sqrt((right**2).sum(1))[None]
    return np.where((left[:, None] == right[None]).all(2), 1.0, np.minimum(left @ right.T / norms, BELOW_ONE))


def plain_neighbours(x, judged_from=0):
    matrix = similarities(x)
    similarity, earlier = np.full(len(x), NOTHING_EARLIER), np.full(len(x), -1)
    for row in range(max(judged_from, 1), len(x)):
        earlier[row] = matrix[row, :row].argmax()  # the first of equals
        judged = np.flatnonzero(matrix[row, judged_from:row] == 1)  # of identical ones, the first that is judged
        earlier[row] = judged_from + judged[0] if len(judged) else earlier[row]
        similarity[row] = matrix[row, earlier[row]]
    return similarity, earlier


def plain_greedy(x, threshold, kept_before=()):
    """Walks all rows, compares each with all kept ones; nothing is collapsed."""
    matrix = similarities(x)
    kept = np.zeros(len(x), bool)
    kept[: len(kept_before)] = kept_before
    kept_row, found = np.full(len(x), -1), np.full(len(x), NOTHING_EARLIER)
    for row in range(len(kept_before), len(x)):
        values = np.where(kept[:row], matrix[row, :row], NOTHING_EARLIER)
        kept[row] = not row or values.max() <= threshold
        if not kept[row]:
            kept_row[row], found[row] = values.argmax(), values.max()
    return kept_row, found


@st.composite
def rows_with_chains(draw):
    """Rows of small whole directions: many are identical, many equally similar, some are only parallel; in 2 to 4 dimensions."""
    dimension = draw(st.integers(2, 4))
    vectors = draw(
        st.lists(st.lists(st.integers(-3, 3), min_size=dimension, max_size=dimension).filter(any), max_size=24)
    )
    if not vectors:
        return np.empty((0, dimension), np.float16)
    x = np.array(vectors, np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    nudge = np.array(draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))))
    x[nudge] *= 1.001  # another float16, the same direction nearly
    return x.astype(np.float16)


@pytest.fixture(params=["int8", "float32", "device"], autouse=True)
def path(request, products_by):
    """All ways of finding candidates: two precisions on the CPU, and the torch operations of devices, run on the CPU."""
    if request.param == "int8" and not is_sound(torch.int8, *screening.INT8_TRIAL):
        pytest.skip("this processor, or this torch, has no exact int8 products")
    with products_by(request.param):
        yield


@pytest.fixture(params=[(512, 4096, 1 << 21), (3, 2, 7)], ids=["wide", "narrow"])
def tiles(request, monkeypatch):
    rows, columns, scores = request.param
    for kind in ("TILE", "DEVICE"):
        monkeypatch.setattr(similarity_module, f"{kind}_ROWS", rows)
        monkeypatch.setattr(similarity_module, f"{kind}_COLUMNS", columns)
    monkeypatch.setattr(duplicates, "SCAN_ROWS", rows)
    monkeypatch.setattr(duplicates, "SCAN_SCORES", scores)


@pytest.mark.slow
@pytest.mark.usefixtures("tiles")
@FIXED
@given(x=rows_with_chains(), old=st.integers(0, 10))
def test_neighbours_are_those_of_the_plain_matrix(x, old):
    for found, expected in zip(most_similar_earlier(x, judged_from=old), plain_neighbours(x, old), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("tiles")
@FIXED
@given(x=rows_with_chains(), old=st.data(), epsilon=st.sampled_from(EPSILONS))
def test_greedy_is_the_plain_walk(x, old, epsilon):
    threshold = duplicate_threshold(epsilon)
    before = sorted(old.draw(st.lists(st.booleans(), max_size=min(len(x), 8))), reverse=True)  # kept ones first
    similarity, earlier = most_similar_earlier(x, judged_from=len(before))
    kept_row, found = greedy(x, similarity, earlier, threshold, kept_before=np.array(before, bool))
    expected_row, expected = plain_greedy(x, threshold, before)
    np.testing.assert_array_equal(kept_row < 0, expected_row < 0)
    # Among copies of a row that goes, all have the sample that is kept for the first judged one.
    values = x + np.float16(0)
    for row in range(len(before), len(x)):
        first = next(i for i in range(len(before), len(x)) if (values[i] == values[row]).all())
        if expected_row[first] < 0 and first != row:
            assert (kept_row[row], found[row]) == (first, 1.0)
        else:
            assert (kept_row[row], found[row]) == (expected_row[first], expected[first])


@FIXED
@given(x=rows_with_chains())
def test_any_earlier_drops_at_least_what_greedy_drops(x):
    similarity, earlier = most_similar_earlier(x)
    for epsilon in EPSILONS:
        threshold = duplicate_threshold(epsilon)
        dropped = greedy(x, similarity, earlier, threshold)[0] >= 0
        assert not (dropped & ~(similarity > threshold)).any()


def angles(*degrees):
    """Unit rows in the plane."""
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float16)


def test_a_chain_is_where_the_rules_differ():
    x = angles(0, 10, 20)  # A ~ B ~ C, and A is no duplicate of C
    threshold = duplicate_threshold(1 - np.cos(np.deg2rad(15)))
    similarity, earlier = most_similar_earlier(x)
    assert (similarity > threshold).tolist() == [False, True, True]  # any-earlier keeps A alone
    assert earlier.tolist() == [-1, 0, 1]
    assert greedy(x, similarity, earlier, threshold)[0].tolist() == [-1, 0, -1]  # B, which is dropped, doesn't drop C


def test_epsilon_0_means_identical_and_nothing_less():
    x = angles(0, 30, 0, 30)
    x[3, 0] = np.nextafter(x[3, 0], np.float16(1))
    assert similarities(x)[1, 3] > 0.9999999
    x = np.concatenate([x, [[1, -0.0]]]).astype(np.float16)  # −0 is 0
    similarity, earlier = most_similar_earlier(x)
    assert (similarity > duplicate_threshold(0)).tolist() == [False, False, True, False, True]
    assert earlier[[2, 4]].tolist() == [0, 0]
    assert greedy(x, similarity, earlier, duplicate_threshold(0))[0].tolist() == [-1, -1, 0, -1, 0]


@pytest.mark.parametrize("dimension", [8, 96, 768])
def test_neighbours_that_float32_cannot_tell_apart(unit_rows, dimension):
    random = np.random.default_rng(5)
    x = np.repeat(unit_rows(3, dimension, seed=3), 40, axis=0)
    near = random.random(x.shape) < 0.02
    x[near] = np.nextafter(x[near], np.float16(1))
    x = random.permutation(x)
    similarity, earlier = most_similar_earlier(x)
    np.testing.assert_array_equal(earlier, plain_neighbours(x)[1])
    np.testing.assert_array_equal(similarity, plain_neighbours(x)[0])
    for cosine in np.unique(similarity[similarity > 0.9])[::10]:  # thresholds that lie exactly on a similarity
        kept_row, _ = greedy(x, similarity, earlier, cosine)
        np.testing.assert_array_equal(kept_row < 0, plain_greedy(x, cosine)[0] < 0)


def test_result_does_not_depend_on_tiles(blobs, monkeypatch):
    x = blobs(700, 24, 5, noise=0.1)
    expected = plain_neighbours(x)
    for rows, columns in ((64, 128), (701, 33)):
        for kind in ("TILE", "DEVICE"):
            monkeypatch.setattr(similarity_module, f"{kind}_ROWS", rows)
            monkeypatch.setattr(similarity_module, f"{kind}_COLUMNS", columns)
        similarity, earlier = most_similar_earlier(x)
        np.testing.assert_array_equal(similarity, expected[0])
        np.testing.assert_array_equal(earlier, expected[1])


def test_a_clique_of_identical_rows_is_compared_once(unit_rows, watched):
    x = np.concatenate([np.repeat(unit_rows(1, 32), 10_000, axis=0), unit_rows(5, 32, seed=1)])
    with watched(similarity_module.Rows, "scores") as on_device, watched(screening.Screen, "scores") as on_cpu:
        similarity, earlier = most_similar_earlier(x)
        compared = [len(rows.unit[left]) * len(rows.unit[right]) for rows, left, right, _ in on_device]
        compared += [len(left.scale) * len(right.scale) for _, left, right, _ in on_cpu]
        assert sum(compared) == 36
        assert (similarity[1:10_000] == 1).all()
        assert (earlier[1:10_000] == 0).all()
        calls = len(on_device), len(on_cpu)
        kept_row, _ = greedy(x, similarity, earlier, duplicate_threshold(0.05))
        assert (kept_row >= 0).sum() == 9999
        assert (len(on_device), len(on_cpu)) == calls  # nothing was in doubt


def test_a_clique_identical_to_one_dropped_before_is_compared_once(watched):
    x = angles(90, 0, *[0] * 500)
    before = np.array([True, False])
    similarity, earlier = most_similar_earlier(x, judged_from=2)
    with watched(duplicates, "_candidates") as calls:
        kept_row, found = greedy(x, similarity, earlier, duplicate_threshold(0.05), kept_before=before)
    assert [len(at) for _, at, _ in calls] == [1]
    assert kept_row.tolist() == [-1, -1, -1] + [2] * 499
    assert (found[3:] == 1).all()


def test_rows_whose_hashes_agree_are_still_told_apart(unit_rows):
    x = unit_rows(20, 4)[np.random.default_rng(0).integers(0, 20, 100)]
    words = x.view(np.uint16)
    first = np.empty(100, np.int64)
    similarity._first_of_identical(words, np.zeros(100, np.uint64), np.full(256, -1, np.int64), first)
    assert first.tolist() == [next(i for i in range(100) if (x[i] == x[row]).all()) for row in range(100)]
    np.testing.assert_array_equal(first_of_identical(x), first)


def test_pairs_between_two_sets(unit_rows, monkeypatch):
    monkeypatch.setattr(similarity_module, "EXACT_PAIRS", 7)
    x = np.concatenate([unit_rows(200, 3), unit_rows(5, 3, seed=4)])
    queries = unit_rows(5, 3, seed=4)
    query, row, similarity = similar_pairs(queries, x, 0.95)
    matrix = similarities(queries, x)
    expected = np.nonzero(matrix > 0.95)
    np.testing.assert_array_equal((query, row), expected)
    np.testing.assert_array_equal(similarity, matrix[expected])
    assert (similarity == 1).sum() == 5


def test_rows_that_are_not_of_unit_norm_are_refused(unit_rows):
    x = unit_rows(4, 8)
    with pytest.raises(ValueError, match="not 1: normalise"):
        most_similar_earlier(np.concatenate([x, 2 * x[:1]]))
    with pytest.raises(ValueError, match="row 4 is zero"):
        most_similar_earlier(np.concatenate([x, 0 * x[:1]]))


@pytest.mark.gpu
def test_devices_agree(blobs):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = blobs(1500, 64, 5, noise=0.1)
    expected = most_similar_earlier(x, device="cpu")
    for found, wanted in zip(most_similar_earlier(x, device="cuda"), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    threshold = duplicate_threshold(0.02)
    np.testing.assert_array_equal(
        greedy(x, *expected, threshold, device="cuda")[0], greedy(x, *expected, threshold, device="cpu")[0]
    )


@pytest.mark.parametrize("rule", ["greedy", "any-earlier"])
def test_duplicate_pairs_are_those_of_the_plain_matrix(blobs, rule):
    x = blobs(300, 24, 5, noise=0.1)
    similarity, earlier = plain_neighbours(x)
    threshold = duplicate_threshold(0.05)
    rows, others, cosines = duplicate_pairs(torch.from_numpy(x), 0.05, rule=rule)
    if rule == "greedy":
        kept_row, found = plain_greedy(x, threshold)
        np.testing.assert_array_equal(rows, np.flatnonzero(kept_row >= 0))
        np.testing.assert_array_equal(others, kept_row[rows])
        np.testing.assert_array_equal(cosines, found[rows])
    else:
        np.testing.assert_array_equal(rows, np.flatnonzero(similarity > threshold))
        np.testing.assert_array_equal(others, earlier[rows])
        np.testing.assert_array_equal(cosines, similarity[rows])
    assert len(rows) > 10


@pytest.mark.parametrize("epsilon", [-0.1, 2.1, float("nan")])
def test_an_epsilon_out_of_range_is_refused(unit_rows, epsilon):
    with pytest.raises(ValueError, match=r"must be in \[0, 2\]"):
        duplicate_pairs(unit_rows(3, 8), epsilon)
