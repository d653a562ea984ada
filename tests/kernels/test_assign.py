import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.kernels import assign as assign_module
from tailwise.kernels import products, screening
from tailwise.kernels.assign import MISSING, NONE, Assigner, assign, no_lists
from tailwise.kernels.grid import GRID, to_grid, unit_rows_on_grid
from tailwise.kernels.nearest import decide_and_list
from tailwise.kernels.products import float32_error, is_sound
from tailwise.kernels.screening import Columns, Screen, scratch_for

FIXED = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.fixture(params=["int8", "float32", "device"])
def path(request, products_by):
    """All ways of screening and deciding: two precisions on the CPU, and the torch operations of devices, run on the CPU."""
    if request.param == "int8" and not is_sound(torch.int8, *screening.INT8_TRIAL):
        pytest.skip("this processor, or this torch, has no exact int8 products")
    with products_by(request.param):
        yield request.param


def brute_force(x, centroids):
    """Labels (ties to the lowest index) and cosines, from dot products that are exact in float64."""
    rows, wide = to_grid(x).astype(np.float64), to_grid(centroids).astype(np.float64)
    norms = np.sqrt((rows**2).sum(axis=1))
    if not len(rows):
        return np.empty(0, np.int32), np.empty(0)
    dots = rows @ wide.T
    labels = np.argmax(dots, axis=1).astype(np.int32)
    similarity = dots[np.arange(len(rows)), labels] / np.where(norms, norms, 1)
    return np.where(norms, labels, MISSING).astype(np.int32), np.where(norms, similarity, 0)


def assert_same(result, expected):
    labels, similarity = result
    assert labels.dtype == np.int32
    assert similarity.dtype == np.float64
    np.testing.assert_array_equal(labels, expected[0])
    np.testing.assert_array_equal(similarity, expected[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("rows", "clusters", "dimension"), [(1, 1, 1), (300, 7, 3), (3000, 60, 64), (500, 2500, 32)])
def test_assign_equals_brute_force(unit_rows, path, rows, clusters, dimension, dtype):
    x = unit_rows(rows, dimension, seed=1, dtype=dtype)
    centroids = unit_rows_on_grid(unit_rows(clusters, dimension, seed=2, dtype=np.float64))
    assert_same(assign(x, centroids, device="cpu"), brute_force(x, centroids))


def near_copies(unit_rows, count, dimension):
    """Centroids that differ by a few grid steps in a few coordinates: float32 dot products can't tell them apart."""
    rng = np.random.default_rng(4)
    base = to_grid(np.repeat(unit_rows(4, dimension, seed=3, dtype=np.float64), count // 4, axis=0)).astype(np.float64)
    steps = rng.integers(-2, 3, base.shape) * (rng.random(base.shape) < 0.1)
    return to_grid(rng.permutation(base + steps * GRID))


@pytest.mark.parametrize("dimension", [8, 96, 768])
def test_centroids_that_float32_cannot_tell_apart(unit_rows, path, dimension):
    centroids = near_copies(unit_rows, 200, dimension)
    x = unit_rows(4, dimension, seed=3, dtype=np.float32)
    x = np.concatenate([x, unit_rows(200, dimension, seed=5, dtype=np.float32)])
    expected = brute_force(x, centroids)
    naive = np.argmax(to_grid(x) @ centroids.T, axis=1)
    assert (naive != expected[0]).mean() > 0.05, "the case must be one that a float32 product gets wrong"
    assert_same(assign(x, centroids, device="cpu"), expected)


@pytest.mark.parametrize("tile", [1, 3, 64])
def test_exact_ties_go_to_the_lowest_index(unit_rows, monkeypatch, path, tile):
    monkeypatch.setattr(assign_module, "TILE_CENTROIDS", tile)
    distinct = unit_rows_on_grid(unit_rows(9, 16, seed=6, dtype=np.float64))
    order = np.random.default_rng(7).integers(0, 9, 40)
    order[30:] = np.arange(10) % 9  # every one is there, most several times
    centroids = distinct[order]
    x = unit_rows(500, 16, seed=8)
    labels, _ = assign(x, centroids, device="cpu")
    first = np.array([np.flatnonzero(order == kind)[0] for kind in range(9)])
    np.testing.assert_array_equal(labels, first[brute_force(x, distinct)[0]])


def test_ties_between_different_centroids_go_to_the_lowest_index(path):
    x = np.full((1, 4), 0.5, np.float32)
    centroids = np.array([[0, 0, 0, -1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]], np.float32)
    assert assign(x, centroids, device="cpu")[0] == 1
    mirrored = np.array([[0.8, 0.6], [0.6, 0.8]], np.float32)
    assert assign(np.array([[np.sqrt(0.5)] * 2], np.float32), mirrored, device="cpu")[0] == 0
    assert assign(np.array([[np.sqrt(0.5)] * 2], np.float32), mirrored[::-1], device="cpu")[0] == 0


@pytest.mark.parametrize("tile_rows", [1, 17, 2048])
@pytest.mark.parametrize("tile_centroids", [1, 13, 2048])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_tiles_and_threads_change_nothing(unit_rows, monkeypatch, path, tile_rows, tile_centroids, threads):
    centroids = np.concatenate([near_copies(unit_rows, 24, 24)] * 2)
    x = np.concatenate([unit_rows(100, 24, seed=9), np.zeros((3, 24), np.float16), unit_rows(4, 24, seed=3)])
    monkeypatch.setattr(assign_module, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(assign_module, "TILE_CENTROIDS", tile_centroids)
    assert_same(Assigner(centroids, device="cpu", threads=threads)(x), brute_force(x, centroids))


@pytest.mark.parametrize("chunk_rows", [1, 7, 100, 65_536])
def test_chunks_change_nothing(unit_rows, path, chunk_rows):
    centroids = near_copies(unit_rows, 40, 16)
    x = unit_rows(256, 16, seed=10)
    assert_same(assign(x, centroids, device="cpu", chunk_rows=chunk_rows), brute_force(x, centroids))


@FIXED
@given(rows=st.integers(1, 30), clusters=st.integers(1, 40), dimension=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_coarse_rows_full_of_ties(products_by, rows, clusters, dimension, seed):
    """Few distinct directions: nearly every maximum is attained by several centroids."""
    rng = np.random.default_rng(seed)
    x = unit_rows_on_grid(rng.integers(-1, 2, (rows, dimension)))
    centroids = unit_rows_on_grid(rng.integers(-1, 2, (clusters, dimension)))
    expected = brute_force(x, centroids)
    assert_same(Assigner(centroids, device="cpu")(x), expected)
    with products_by("device"):
        assert_same(Assigner(centroids, device="cpu")(x), expected)


def test_permuted_columns_give_the_same_bits(unit_rows, path):
    x, centroids = unit_rows(300, 128, seed=11), unit_rows(50, 128, seed=12, dtype=np.float32)
    order = np.random.default_rng(0).permutation(128)
    assert_same(assign(x[:, order], centroids[:, order], device="cpu"), assign(x, centroids, device="cpu"))


def test_rows_that_point_away_from_every_centroid(path):
    centroids = np.array([[0.6, 0.8], [0.8, 0.6]], np.float32)
    assert_same(assign(-centroids, centroids, device="cpu"), brute_force(-centroids, centroids))


def test_zero_rows_are_missing(unit_rows, path):
    x = unit_rows(6, 8)
    x[1], x[4] = 0, -0.0
    labels, similarity = assign(x, unit_rows(3, 8, seed=1, dtype=np.float32), device="cpu")
    np.testing.assert_array_equal(labels == MISSING, [False, True, False, False, True, False])
    assert (similarity[[1, 4]] == 0).all()


def test_rows_of_zeros_have_no_candidates(unit_rows, products_by, watched):
    """Every centroid is as near to them as any other: a device would hold all pairs at once."""
    most = []

    def count(scores, x, centroids, first, error, labels, dots):
        most.append(
            (scores >= torch.maximum(scores.amax(1).double() - 2 * error, dots - error)[:, None]).sum(1).tolist()
        )

    x = np.concatenate([np.zeros((2, 16), np.float16), unit_rows(1, 16)])
    with products_by("device"), watched(assign_module, "_resolve_torch", count):
        assign(x, unit_rows(50, 16, seed=1, dtype=np.float32), device="cpu")
    assert most == [[0, 0, 1]]


def test_tensors_and_chunks_as_they_come(unit_rows):
    x, centroids = unit_rows(100, 16), unit_rows(7, 16, seed=1, dtype=np.float32)
    expected = brute_force(x, centroids)
    assert_same(assign(torch.from_numpy(x), torch.from_numpy(centroids), device="cpu"), expected)
    chunks = (torch.from_numpy(x[start : start + 30]) for start in range(0, 100, 30))
    assert_same(assign(chunks, centroids, device="cpu"), expected)


def test_no_rows(path):
    labels, similarity = assign(np.empty((0, 4), np.float16), np.eye(4, dtype=np.float32), device="cpu")
    assert (labels.dtype, similarity.dtype, len(labels), len(similarity)) == (np.int32, np.float64, 0, 0)


def test_rows_that_are_not_contiguous(unit_rows, path):
    x, centroids = unit_rows(200, 32), unit_rows(9, 32, seed=1, dtype=np.float32)
    assert_same(assign(x[::3], centroids, device="cpu"), brute_force(x[::3], centroids))
    assert_same(assign(np.asfortranarray(x), centroids, device="cpu"), brute_force(x, centroids))


@pytest.mark.parametrize("factor", [0.5, 1.1, np.nan])
def test_rows_that_are_not_normalised_are_refused(unit_rows, path, factor):
    x = unit_rows(10, 8, dtype=np.float32)
    x[6] *= factor
    with pytest.raises(ValueError, match="row 6 has norm"):
        assign(x, unit_rows(3, 8, seed=1, dtype=np.float32), device="cpu")


def test_similarity_is_the_cosine_of_rows_whose_norm_is_a_little_off(path):
    """Stored float16 rows are off by up to a thousandth; a row's own norm is divided out."""
    x = np.array([[0.6 * 1.02, 0.8 * 1.02]], np.float32)
    _, similarity = assign(x, np.array([[0.8, 0.6]], np.float32), device="cpu")
    np.testing.assert_allclose(similarity, 0.96, atol=1e-7)


@pytest.mark.parametrize("dimension", [2, 33, 768, 2048])
def test_the_float32_error_bounds_float32_products(unit_rows, dimension):
    x = unit_rows(200, dimension, seed=13, dtype=np.float32)
    centroids = unit_rows_on_grid(unit_rows(100, dimension, seed=14, dtype=np.float64))
    x = np.concatenate([to_grid(x), centroids, np.abs(centroids)])  # sums of one sign round worst
    exact = x.astype(np.float64) @ np.concatenate([centroids, np.abs(centroids)]).T.astype(np.float64)
    scores = torch.mm(torch.from_numpy(x), torch.from_numpy(np.concatenate([centroids, np.abs(centroids)])).T).numpy()
    one_by_one = np.zeros_like(scores)
    for axis in range(dimension):
        one_by_one += np.outer(x[:, axis], np.concatenate([centroids, np.abs(centroids)])[:, axis])
    for product in (scores, one_by_one):
        assert np.abs(product - exact).max() <= float32_error(dimension)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_elsewhere_in_the_process_changes_nothing(unit_rows, path, precision):
    x, centroids = unit_rows(500, 256, seed=17), near_copies(unit_rows, 200, 256)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert_same(assign(x, centroids, device="cpu"), brute_force(x, centroids))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def set_precision():
    """Sets a backend's float32 precision by torch's newer switch, and puts it back."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch before 2.9 has the old switch alone")
    changed = []

    def change(backend, precision):
        changed.append((backend, backend.fp32_precision))
        backend.fp32_precision = precision

    yield change
    for backend, precision in changed:
        backend.fp32_precision = precision


def test_the_newer_precision_switch_changes_nothing(unit_rows, products_by, set_precision):
    x, centroids = unit_rows(100, 16, seed=17), near_copies(unit_rows, 40, 16)
    expected = brute_force(x, centroids)
    set_precision(torch.backends.cuda.matmul, "tf32")
    with products_by("device"):
        assert_same(assign(x, centroids, device="cpu"), expected)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_the_cpu_product_is_of_full_precision(unit_rows, watched, set_precision):
    """Some CPUs have bfloat16 products too, which "medium" allows."""
    precisions = set()

    def note(*_, **__):
        precisions.add(torch.backends.mkldnn.matmul.fp32_precision)

    set_precision(torch.backends.mkldnn.matmul, "bf16")
    with watched(torch, "mm", note), watched(products, "_onednn", note):
        Assigner(unit_rows(40, 16, seed=1, dtype=np.float32), device="cpu", precision="float32")(unit_rows(100, 16))
    assert precisions == {"ieee"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("clusters", "dimension"), [(5, 4), (200, 64), (5000, 768)])
def test_cuda_gives_the_same_bits_as_the_cpu(unit_rows, clusters, dimension):
    centroids = np.concatenate([near_copies(unit_rows, 200, dimension), unit_rows(clusters, dimension, seed=15)])
    x = np.concatenate([unit_rows(5000, dimension, seed=16), unit_rows(4, dimension, seed=3), np.zeros((2, dimension))])
    x = x.astype(np.float16)
    assert_same(assign(x, centroids, device="cuda"), assign(x, centroids, device="cpu"))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tiles", [[0, 320], [0, 64, 320], [0, 1, 2, 130, 320]])
@pytest.mark.parametrize("slots", [1, 8, 24])
def test_lists_bound_every_column(seed, tiles, slots):
    random = np.random.default_rng(seed)
    directions = unit_rows_on_grid(random.normal(size=(4, 64)))
    spread = [0.01, 0.1, 1.0][seed % 3]  # many columns as near as the nearest, a few, none
    columns = unit_rows_on_grid(directions[random.integers(4, size=320)] + spread / 8 * random.normal(size=(320, 64)))
    columns[random.integers(320, size=30)] = columns[0]
    x = unit_rows_on_grid(directions[random.integers(4, size=90)] + 0.1 * random.normal(size=(90, 64)))
    screen = Screen(to_grid(columns.mean(axis=0)))
    labels, dots = np.full(90, MISSING, np.int32), np.full(90, NONE)
    lists = listed, near, bound, rest = no_lists(90, slots)
    coded = screen.rows(x)
    for first, last in itertools.pairwise(tiles):
        scores = screen.scores(
            coded, Columns.of(screen.columns(columns[first:last])), scratch_for(screen.precision, 90, last - first)
        )
        assert decide_and_list(*scores, x, columns, first, labels, dots, np.float32(0.1 * spread), *lists)
    exact = x.astype(np.float64) @ columns.T.astype(np.float64)
    assert (labels == exact.argmax(axis=1)).all()
    assert (dots == exact.max(axis=1)).all()
    for row in range(90):
        here = near[row, : listed[row]]
        assert len(set(here)) == len(here)
        assert (exact[row, here] <= bound[row, : listed[row]]).all()
        assert (np.delete(exact[row], here) <= rest[row]).all()
