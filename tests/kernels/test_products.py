"""Products that are right whatever the library underneath does: wrong ones are replaced, and nothing ends."""

import logging

import numpy as np
import pytest
import torch

from tailwise.kernels import products, screening
from tailwise.kernels.assign import Assigner, assign
from tailwise.kernels.density import NeighbourCounter
from tailwise.kernels.duplicates import duplicate_pairs, greedy
from tailwise.kernels.grid import to_grid, unit_rows_on_grid
from tailwise.kernels.kmeans import kmeans
from tailwise.kernels.products import CODE_STEPS, is_sound, multiply
from tailwise.kernels.similarity import most_similar_earlier, similar_pairs

REAL = torch._int_mm


def wrong_of_one(left, right, out):
    """The fault of torch 2.14.1 on AMD Zen 4: wrong where the inner dimension is 1, of 16 or more rows and columns."""
    REAL(left, right, out=out)
    return out.add_(3) if left.shape[1] == 1 and min(out.shape) >= 16 else out


def saturated(left, right, out):
    """Sums that overflow 16 bits, as on a CPU without VNNI."""
    return REAL(left, right, out=out).clamp_(-(2**15), 2**15 - 1)


def none_at_all(left, right, out):
    raise RuntimeError("_int_mm: no such product for CPUs")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as tiles do; small products are faster so
    yield
    torch.set_num_threads(before)


INT8 = {"library": REAL, "wrong_of_one": wrong_of_one, "saturated": saturated, "none_at_all": none_at_all}


@pytest.fixture
def int8_product(monkeypatch):
    """Puts one of INT8 in the place of the library's product, and forgets what was tried before and after."""

    def use(name):
        monkeypatch.setattr(torch, "_int_mm", INT8[name])
        forget()

    yield use
    monkeypatch.undo()
    forget()


def forget():
    is_sound.cache_clear()
    products._distrusted.clear()
    products._log_once.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("dimension", range(1, 18))
def test_int8_products_equal_numpys_for_every_small_shape(int8_product, name, dimension):
    int8_product(name)
    rng = np.random.default_rng(dimension)
    x = rng.integers(-CODE_STEPS, CODE_STEPS + 1, (40, dimension), np.int8)
    y = rng.integers(-CODE_STEPS, CODE_STEPS + 1, (40, dimension), np.int8)
    x[:3], y[:3] = CODE_STEPS, CODE_STEPS  # the greatest sums
    exact = x.astype(np.int64) @ y.astype(np.int64).T
    edges = (1, 2, 15, 16, 17, 31, 32, 33, 40)
    every = range(1, 41)
    for rows in every if name == "library" else edges:
        for columns in every if name == "library" and dimension < 4 else edges:
            scratch = torch.empty(40 * 40, dtype=torch.int32)
            found = multiply(torch.from_numpy(x[:rows]), torch.from_numpy(y[:columns]), scratch)
            assert found.data_ptr() == scratch.data_ptr()
            np.testing.assert_array_equal(found.numpy(), exact[:rows, :columns])


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("dimension", [256, 768, 4097])
def test_int8_products_equal_numpys_for_long_rows(int8_product, name, dimension):
    int8_product(name)
    x = np.random.default_rng(1).integers(-CODE_STEPS, CODE_STEPS + 1, (64, dimension), np.int8)
    x[:2] = CODE_STEPS
    codes = torch.from_numpy(x)
    found = multiply(codes, codes, torch.empty(64 * 64, dtype=torch.int32))
    np.testing.assert_array_equal(found.numpy(), x.astype(np.int64) @ x.astype(np.int64).T)


def has_onednn():
    return is_sound(torch.int8, 64, 64, 64, onednn=True)


@pytest.mark.parametrize("dimension", [16, 100, 512, 768, 1100, 4097])
@pytest.mark.parametrize("rows", [1, 64, 384])
def test_int8_products_of_onednn_equal_numpys(dimension, rows):
    """Beyond 2²⁴ they are rounded to float32."""
    if not (has_onednn() and is_sound(torch.int8, rows, 272, dimension, onednn=True)):
        pytest.skip("this torch has no int8 products of oneDNN, or rounds large sums otherwise")
    rng = np.random.default_rng(dimension)
    x, y = (rng.integers(-CODE_STEPS, CODE_STEPS + 1, (count, dimension), np.int8) for count in (rows, 272))
    x[:1], y[:3] = CODE_STEPS, CODE_STEPS  # the greatest sums
    arranged = products._arranged(torch.from_numpy(y), 384)
    found = multiply(torch.from_numpy(x), torch.from_numpy(y), torch.empty(0, dtype=torch.int32), arranged)
    np.testing.assert_array_equal(found.numpy(), (x.astype(np.int64) @ y.astype(np.int64).T).astype(np.float32))


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_products_of_onednn_change_no_result(monkeypatch, unit_rows, products_by, watched, precision):
    """Neither of assignment nor of k-means, whose iterations use several numbers of rows and columns."""
    if not has_onednn():
        pytest.skip("this torch has no int8 products of oneDNN")
    if precision == "int8" and screening.faster_precision() != "int8":
        pytest.skip("no int8 products on this processor")
    x, centroids = unit_rows(1500, 48), unit_rows(700, 48, dtype=np.float32)
    made = []
    with products_by(precision), watched(products, "_onednn") as calls:
        for faster in (False, True):
            monkeypatch.setattr(products, "onednn_is_faster", lambda *_, faster=faster: faster)
            made.append((*assign(x, centroids, device="cpu"), kmeans(x, 300, device="cpu", iterations=4).centroids))
    for left, right in zip(*made, strict=True):
        np.testing.assert_array_equal(left, right)
    assert getattr(torch, precision) in {left.dtype for left, *_ in calls}


@pytest.mark.parametrize("fault", ["missing", "wrong"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_products_of_onednn_that_are_missing_or_wrong_are_not_used(monkeypatch, fault, dtype):
    def raising(*_):
        raise AttributeError

    faulty = raising if fault == "missing" else lambda left, _, columns: torch.zeros(len(left), columns)
    monkeypatch.setattr(products, "_onednn", faulty)
    forget()
    assert not products.onednn_is_faster.__wrapped__(dtype, 64, 128)
    monkeypatch.undo()
    forget()


def test_float32_products_are_precise_where_the_library_rounds_to_bfloat16(monkeypatch, unit_rows):
    real = torch.mm

    def coarse(left, right, out):
        return real(left.bfloat16().float(), right.bfloat16().float(), out=out)

    x = torch.from_numpy(unit_rows(30, 64, dtype=np.float32))
    exact, out = x.double() @ x.double().T, torch.empty(30, 30)
    forget()
    monkeypatch.setattr(torch, "mm", coarse)
    assert float((coarse(x, x.T, out).double() - exact).abs().max()) > products.float32_error(64)
    assert float((multiply(x, x, torch.empty(30 * 30)).double() - exact).abs().max()) <= products.float32_error(64)
    monkeypatch.undo()
    forget()


def results(x, centroids):
    """Labels, cosines, k-means and duplicates of some rows; all of them use products of int8 codes where that is asked for."""
    labels, cosines = Assigner(centroids, device="cpu", precision="int8")(x)
    fit = kmeans(x, min(2, len(np.unique(x, axis=0))), iterations=3, seed=1, device="cpu")
    return labels, cosines, fit.centroids, *duplicate_pairs(x, 0.05, device="cpu")


@pytest.mark.parametrize(
    ("name", "dimension", "logs"),
    [("library", 48, 0), ("wrong_of_one", 1, 1), ("wrong_of_one", 2, 0), ("saturated", 48, 1), ("none_at_all", 3, 1)],
)
def test_wrong_products_change_no_result_and_are_logged_once(int8_product, products_by, caplog, name, dimension, logs):
    rng = np.random.default_rng(dimension)
    x = unit_rows_on_grid(rng.normal(size=(300, dimension))).astype(np.float16)
    centroids = unit_rows_on_grid(rng.normal(size=(40, dimension)))
    int8_product("library")
    with products_by("int8"):
        expected = results(x, centroids)
    caplog.clear()  # the library itself may be wrong here
    int8_product(name)
    with products_by("int8"), caplog.at_level(logging.WARNING):
        for found, wanted in zip(results(x, centroids), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert len([record for record in caplog.records if "products" in record.message]) == logs


def fitted(x):
    """A k-means fit of rows that come as a stream, which can be read once."""
    return kmeans((block for block in (x[:200], x[200:])), 60, iterations=6, tolerance=-1, device="cpu").centroids


KERNELS = {
    "assign": lambda x, centroids: assign(x, centroids, device="cpu"),
    "kmeans": lambda x, _: fitted(x),
    "most_similar_earlier": lambda x, _: most_similar_earlier(x, device="cpu"),
    "greedy": lambda x, _: greedy(x, *plain_neighbours(x), 0.5, device="cpu"),
    "similar_pairs": lambda x, _: similar_pairs(x[:30], x, 0.6, device="cpu"),
    "density": lambda x, centroids: NeighbourCounter(centroids, 0.4, device="cpu")(x),
}


def plain_neighbours(x):
    """The most similar earlier row of each row, without a screen."""
    dots = x.astype(np.float64) @ x.astype(np.float64).T
    norms = np.sqrt(dots.diagonal())
    cosines = np.where(np.tri(len(x), k=-1, dtype=bool), dots / np.outer(norms, norms), -np.inf)
    return cosines.max(1), np.where(np.arange(len(x)) > 0, cosines.argmax(1), -1)


@pytest.fixture(params=["int8", "float32", "device"])
def path(request, monkeypatch, products_by):
    """All kinds of products, those of devices on the CPU."""
    with products_by(request.param):
        yield request.param
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("name", KERNELS)
def test_products_that_become_wrong_after_their_trial_end_nothing(monkeypatch, caplog, blobs, unit_rows, path, name):
    x, centroids = blobs(400, 32, 30), unit_rows(40, 32, seed=1, dtype=np.float32)
    forget()
    expected = KERNELS[name](x, centroids)  # by products that were tried and found right
    caplog.clear()
    real, real_int8, real_onednn = torch.mm, torch._int_mm, products._onednn
    monkeypatch.setattr(products, "_onednn", lambda *each: real_onednn(*each).add_(0.01))
    monkeypatch.setattr(torch, "mm", lambda left, right, out: real(left, right, out=out).add_(0.01))
    monkeypatch.setattr(torch, "_int_mm", lambda left, right, out: real_int8(left, right, out=out).mul_(2))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for found, wanted in zip(KERNELS[name](x, centroids), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)
    assert [record.message for record in caplog.records] == [
        "a matrix product is wrong on this processor; float64 products replace all from now on"
    ]


@pytest.mark.parametrize("dimension", range(1, 18))
@pytest.mark.parametrize("kind", ["int8", "float32", "device"])
def test_assign_equals_the_float64_reference_in_few_dimensions(products_by, kind, dimension):
    rng = np.random.default_rng(dimension)
    for rows in (1, 16, 40):
        for columns in (1, 15, 16, 40):
            x, y = (unit_rows_on_grid(rng.integers(-1, 2, (count, dimension))) for count in (rows, columns))
            dots = x.astype(np.float64) @ to_grid(y).astype(np.float64).T
            with products_by(kind):
                labels, _ = Assigner(y, device="cpu")(x)
            present = x.any(axis=1)
            np.testing.assert_array_equal(labels[present], dots.argmax(axis=1)[present])
            np.testing.assert_array_equal(assign(x, y, device="cpu")[0], labels)
