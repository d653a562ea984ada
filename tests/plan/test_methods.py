"""Invariants of every method of the table: a new method is tested by being listed."""

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.errors import UserError
from tailwise.kernels.centroids import neighbour_distance
from tailwise.kernels.grid import unit_rows_on_grid
from tailwise.plan.methods import (
    METHODS,
    PICKS,
    Clusters,
    Method,
    find_method,
    load_methods,
    method_options,
    register_method,
    weigh,
)
from tailwise.plan.quotas import UNITS
from tailwise.steps.planning.weighted import quotas_of

FIXED = settings(derandomize=True, deadline=None, max_examples=40)

every_method = pytest.mark.parametrize("name", METHODS)
OPTION_VALUES = {
    "alpha": st.floats(0.0, 1.0),
    "temperature": st.floats(0.02, 5.0),
    "neighbours": st.integers(1, 60),
    "threshold": st.floats(0.0, 1e6),
}


@st.composite
def pools(draw):
    count = draw(st.one_of(st.integers(1, 3), st.integers(1, 60)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = np.ceil(rng.pareto(0.8, count) * 4 + 1e-9).clip(max=10**6).astype(np.int64)
    density = rng.integers(0, 2 * size + 1)
    return Clusters(size, rng.random(count), 2 * rng.random(count), density=density)


@st.composite
def pools_with_centroids(draw):
    """As `pools`, of real points: distances to any number of neighbours can be looked up."""
    pool = draw(pools())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    centroids = unit_rows_on_grid(rng.normal(size=(len(pool.size), 8)))
    return replace(pool, d_inter=neighbour_distance(centroids), centroids=lambda: centroids)


def plan_config(budget, repeats=1, least=0, balance=0.0, dynamic=True):
    bounds = {"budget": budget, "max_repeats": repeats, "min_per_cluster": least, "class_balance": balance}
    return {**bounds, "dynamic": dynamic, "draw": "stream"}


@every_method
@FIXED
@given(pool=pools(), data=st.data())
def test_quotas_of_every_method(name, pool, data):
    method = METHODS[name]
    options = method_options(
        name, {option: data.draw(OPTION_VALUES[option], label=option) for option in method.options}
    )
    weights = weigh(method, pool, options)
    assert weights.dtype == np.float64
    assert weights.shape == pool.size.shape
    assert (weights > 0).all()
    assert np.isfinite(weights).all()
    repeats = data.draw(st.sampled_from([1, 2, 20]))
    balance = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    least = min(method.min_per_cluster, 1) * len(pool.size) or 1
    budget = data.draw(st.integers(least, repeats * int(pool.size.sum())))
    for dynamic, unit in ((False, UNITS), (True, 1)):
        config = plan_config(budget, repeats, method.min_per_cluster, balance, dynamic)
        quotas = quotas_of(pool, method, options, config)
        lower = np.minimum(max(method.min_per_cluster, int(balance * budget / len(pool.size))), repeats * pool.size)
        assert int(quotas.sum()) == budget * UNITS
        assert not (quotas % unit).any()
        assert (quotas >= lower * UNITS).all()
        assert (quotas <= repeats * pool.size * UNITS).all()
        np.testing.assert_array_equal(quotas, quotas_of(pool, method, options, config))


# --- parity with plain implementations, written from METHODS alone -----------------------------------------------------


def plain_weights(name, pool, options):
    sizes = pool.size.tolist()
    if name in {"dbp", "dbp-dynamic"}:
        centroids, count = pool.centroids(), len(sizes)
        logits = []
        for at in range(count):
            distances = sorted(
                1 - float(np.dot(centroids[at].astype(float), centroids[other].astype(float)))
                for other in range(count)
                if other != at
            )[: int(options["neighbours"])]
            inter = math.fsum(distances) / len(distances) if distances else 0.0
            logits.append(float(pool.d_intra[at]) * inter / options["temperature"])
        total = math.fsum(math.exp(item - max(logits)) for item in logits)
        return [math.exp(item - max(logits)) / total for item in logits]
    if name == "density":
        densities = np.maximum(pool.density, 1).tolist()
        return [size * near ** (options["alpha"] - 1) for size, near in zip(sizes, densities, strict=True)]
    if name == "soft-cap":
        limit = options["threshold"] or sum(sizes) / len(sizes)
        return [size if size <= limit else limit * (size / limit) ** options["alpha"] for size in sizes]
    alphas = {"dynamics": options.get("alpha"), "ssp": 1.0, "proportional": 1.0}
    return [size ** alphas.get(name, 0.0) for size in sizes]


def plain_quotas(name, pool, options, budget, repeats, lower):
    """By bisection, in samples."""
    weights = plain_weights(name, pool, options)
    upper = [min(repeats * size, budget) for size in pool.size.tolist()]
    total = math.fsum(weights)
    shift = METHODS[name].fill == "shift"

    def quotas(level):
        wanted = [w / total * budget - level if shift else level * w for w in weights]
        return [min(max(q, least), most) for q, least, most in zip(wanted, lower, upper, strict=True)]

    low, high = (-2.0 * budget - 1, 2.0 * budget + 1) if shift else (0.0, max(upper) / min(weights))
    for _ in range(300):
        middle = 0.5 * (low + high)
        if (math.fsum(quotas(middle)) < budget) == shift:
            high = middle
        else:
            low = middle
    return quotas(high)


@every_method
@FIXED
@given(pool=pools_with_centroids(), data=st.data())
def test_quotas_equal_a_plain_implementation(name, pool, data):
    method = METHODS[name]
    options = method_options(
        name, {option: data.draw(OPTION_VALUES[option], label=option) for option in method.options}
    )
    repeats = data.draw(st.sampled_from([1, 3]))
    balance = data.draw(st.sampled_from([0.0, 0.5]))
    least = method.min_per_cluster * len(pool.size) or 1
    budget = data.draw(st.integers(least, repeats * int(pool.size.sum())))
    floor = max(method.min_per_cluster, int(balance * budget / len(pool.size)))
    lower = [min(floor, repeats * size, budget) for size in pool.size.tolist()]
    expected = plain_quotas(name, pool, options, budget, repeats, lower)
    exact = quotas_of(pool, method, options, plan_config(budget, repeats, method.min_per_cluster, balance)) / UNITS
    np.testing.assert_allclose(exact, expected, rtol=1e-6, atol=1e-6 * budget)
    whole = (
        quotas_of(pool, method, options, plan_config(budget, repeats, method.min_per_cluster, balance, False)) / UNITS
    )
    assert (np.abs(whole - expected) < 1 + 1e-6 * budget).all()


@every_method
@FIXED
@given(pool=pools(), seed=st.integers(0, 2**32))
def test_the_order_of_clusters_does_not_matter(name, pool, seed):
    """What a weight says about a cluster must not hang on its index."""
    order = np.random.default_rng(seed).permutation(len(pool.size))
    shuffled = Clusters(pool.size[order], pool.d_intra[order], pool.d_inter[order], density=pool.density[order])
    options = method_options(name, {})
    np.testing.assert_allclose(
        weigh(METHODS[name], shuffled, options), weigh(METHODS[name], pool, options)[order], rtol=1e-12
    )


@every_method
def test_the_table_is_complete(name):
    method = METHODS[name]
    assert method.summary
    assert method.source
    assert "\n" not in method.summary + method.source
    assert method.fill in {"scale", "shift"}
    assert method.pick in PICKS
    assert method.grouping in {"clusters", "pool"}
    assert not (method.dynamic and PICKS[method.pick].by), "ranked picks are static by nature"
    keywords = {
        parameter.name
        for parameter in inspect.signature(method.weight).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert keywords == set(method.options)
    assert set(method.options) <= set(OPTION_VALUES), "give the new option its values in OPTION_VALUES"


def test_the_methods_of_the_papers_are_there():
    assert set(METHODS) == {
        *("dbp", "ssp", "dynamics", "dbp-dynamic", "flat", "proportional", "cap", "random", "top-score", "density"),
        "soft-cap",
    }
    assert METHODS["dbp"].options["temperature"] == 0.1
    assert METHODS["dynamics"].options["alpha"] == 0.2
    assert (METHODS["dbp"].fill, METHODS["dbp"].pick, METHODS["dbp"].dynamic) == ("shift", "hardest", False)
    assert (METHODS["ssp"].fill, METHODS["ssp"].pick, METHODS["ssp"].dynamic) == ("scale", "hardest", False)
    assert (METHODS["dynamics"].fill, METHODS["dynamics"].pick, METHODS["dynamics"].dynamic) == (
        "scale",
        "random",
        True,
    )


def test_find_method_names_the_known_ones():
    assert find_method("dbp") is METHODS["dbp"]
    with pytest.raises(UserError, match=r"unknown method 'dpb': did you mean 'dbp'"):
        find_method("dpb")
    with pytest.raises(UserError, match="unknown method"):
        method_options("dpb", {})


def test_options_have_defaults():
    assert method_options("dynamics", {}) == {"alpha": 0.2}
    assert method_options("dynamics", {"alpha": None, "temperature": None}) == {"alpha": 0.2}
    assert method_options("dynamics", {"alpha": 0.0}) == {"alpha": 0.0}
    assert method_options("dbp", {"temperature": 0.5, "alpha": None}) == {"temperature": 0.5, "neighbours": 20}
    assert method_options("random", {}) == {}
    assert METHODS["dynamics"].options["alpha"] == 0.2, "what a user gives must not stick"


@every_method
@pytest.mark.parametrize("option", ["alpha", "temperature", "tau"])
def test_options_of_other_methods_are_refused(name, option):
    if option in METHODS[name].options:
        assert method_options(name, {option: 0.5})[option] == 0.5
    else:
        with pytest.raises(UserError, match=rf"`{option}` does nothing with method '{name}'"):
            method_options(name, {option: 0.5})


@pytest.mark.parametrize("alpha", [-0.01, 1.01, math.nan, math.inf])
def test_alpha_out_of_bounds_is_refused(alpha):
    with pytest.raises(UserError, match=rf"`alpha` {alpha}: must be a number between 0 and 1"):
        method_options("dynamics", {"alpha": alpha})


@pytest.mark.parametrize("temperature", [0.0, -1.0, 0.00009, math.nan, math.inf])
def test_temperature_out_of_bounds_is_refused(temperature):
    with pytest.raises(UserError, match=rf"`temperature` {temperature}: must be a number between 0.0001"):
        method_options("dbp", {"temperature": temperature})


def test_weights_may_vanish_by_shift_but_not_by_scale():
    """At a small temperature the softmax leaves most clusters nothing; a projection can fill them all the same, a scale can't."""
    pool = Clusters(np.array([4, 4]), np.array([0.1, 0.9]), np.array([0.9, 0.9]))
    weights = weigh(METHODS["dbp"], pool, {"temperature": 0.0005})
    assert weights.tolist() == [0.0, 1.0]
    scaled = replace(METHODS["dbp"], fill="scale")
    with pytest.raises(UserError, match=r"2 positive finite numbers.*temperature"):
        weigh(scaled, pool, {"temperature": 0.0005})


def test_weights_of_a_wrong_shape_are_refused():
    pool = Clusters(np.array([4, 4]), np.ones(2), np.ones(2))
    with pytest.raises(UserError, match=r"2 positive finite numbers.*\(3,\)"):
        weigh(Method("s", "s", lambda clusters: np.ones(3)), pool, {})


@pytest.fixture
def no_registration():
    """What a test registers is gone afterwards."""
    from tailwise.plan import methods

    before = dict(methods._METHODS)
    yield
    methods._METHODS.clear()
    methods._METHODS.update(before)


@pytest.mark.usefixtures("no_registration")
def test_a_method_of_ones_own_takes_three_lines(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import tailwise\n@tailwise.register_method('root')\ndef root(clusters, *, power=0.5): return clusters.size**power\n"
    )
    load_methods(path)
    method = METHODS["root"]
    assert method.registered
    assert method.options == {"power": 0.5}
    assert method_options("root", {"power": 0.25}) == {"power": 0.25}
    pool = Clusters(np.array([16, 1]), np.ones(2), np.ones(2))
    assert weigh(method, pool, {"power": 0.25}).tolist() == [2.0, 1.0]
    assert quotas_of(pool, method, {"power": 0.5}, plan_config(5)).tolist() == [4 * UNITS, UNITS]
    load_methods(path)  # may be repeated


@pytest.mark.usefixtures("no_registration")
def test_methods_are_registered_with_sense(tmp_path):
    with pytest.raises(UserError, match="'dbp' is a method of tailwise"):
        register_method("dbp")
    with pytest.raises(UserError, match="pick 'best' one of random"):
        register_method("mine", pick="best")
    path = tmp_path / "mine.py"
    path.write_text("import tailwise\n")
    with pytest.raises(UserError, match="registers no method"):
        load_methods(path)
    path.write_text("1 / 0\n")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load_methods(path)
    with pytest.raises(UserError, match="can't be run"):
        load_methods(tmp_path / "absent.py")


@pytest.mark.parametrize("neighbours", [0, 1.5, -3])
def test_neighbours_are_whole(neighbours):
    with pytest.raises(UserError, match=f"`neighbours` {neighbours}: must be a whole number between 1"):
        method_options("dbp", {"neighbours": neighbours})


def test_complexity_without_distances_is_refused():
    nothing = np.full(2, np.nan)
    with pytest.raises(UserError, match="no centroids, and so no distances"):
        weigh(METHODS["dbp"], Clusters(np.array([1, 2]), nothing, nothing), {"temperature": 0.1, "neighbours": 20})
