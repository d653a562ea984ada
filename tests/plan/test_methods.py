"""Invariants of every method of the table: a new method is tested by being listed."""

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.errors import UserError
from tailwise.plan.methods import METHODS, PICKS, Method, find_method, method_options, weigh
from tailwise.plan.quotas import UNITS, fill_by_scale, fill_by_shift, round_to_sum
from tailwise.plan.weights import Clusters

FIXED = settings(derandomize=True, deadline=None, max_examples=40)

every_method = pytest.mark.parametrize("name", METHODS)
OPTION_RANGES = {"alpha": (0.0, 1.0), "temperature": (0.02, 5.0)}


@st.composite
def pools(draw):
    count = draw(st.one_of(st.integers(1, 3), st.integers(1, 60)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = np.ceil(rng.pareto(0.8, count) * 4 + 1e-9).clip(max=10**6).astype(np.int64)
    return Clusters(size, rng.random(count), 2 * rng.random(count))


def fill(method, weights, size, budget, repeats, unit):
    """A method's quotas in whole units, as a plan has them."""
    lower, upper = np.zeros(len(size)), repeats * size.astype(np.float64)
    if method.fill == "scale":
        quotas = fill_by_scale(weights, upper, budget)
    else:
        lower = np.ones(len(size))
        quotas = fill_by_shift(weights / weights.sum() * budget, lower, upper, budget)
    bounds = lower.astype(np.int64) * unit, repeats * size * unit
    return round_to_sum(quotas * unit, budget * unit, *bounds, size), bounds


@every_method
@FIXED
@given(pool=pools(), data=st.data())
def test_quotas_of_every_method(name, pool, data):
    method = METHODS[name]
    options = method_options(
        name, {option: data.draw(st.floats(*OPTION_RANGES[option]), label=option) for option in method.options}
    )
    weights = weigh(method, pool, options)
    assert weights.dtype == np.float64
    assert weights.shape == pool.size.shape
    assert (weights > 0).all()
    assert np.isfinite(weights).all()
    repeats = data.draw(st.sampled_from([1, 2, 20]))
    least = len(pool.size) if method.fill == "shift" else 1
    budget = data.draw(st.integers(least, repeats * int(pool.size.sum())))
    for unit in (1, UNITS):
        quotas, (lower, upper) = fill(method, weights, pool.size, budget, repeats, unit)
        assert int(quotas.sum()) == budget * unit
        assert (quotas >= lower).all()
        assert (quotas <= upper).all()
        again, _ = fill(method, weigh(method, pool, options), pool.size, budget, repeats, unit)
        np.testing.assert_array_equal(quotas, again)


@every_method
@FIXED
@given(pool=pools(), seed=st.integers(0, 2**32))
def test_the_order_of_clusters_does_not_matter(name, pool, seed):
    """What a weight says about a cluster must not hang on its index."""
    order = np.random.default_rng(seed).permutation(len(pool.size))
    shuffled = Clusters(pool.size[order], pool.d_intra[order], pool.d_inter[order])
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
    assert not (method.dynamic and method.pick != "random"), "ranked picks are static by nature"
    keywords = {
        parameter.name
        for parameter in inspect.signature(method.weight).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert keywords == set(method.options)
    assert set(method.options) <= set(OPTION_RANGES), "give the new option a range in OPTION_RANGES"


def test_the_methods_of_the_papers_are_there():
    assert {"dbp", "ssp", "dynamics", "flat", "proportional", "random"} <= set(METHODS)
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
    with pytest.raises(UserError, match=r"unknown method 'dpb'.*dbp, ssp, dynamics"):
        find_method("dpb")
    with pytest.raises(UserError, match="unknown method"):
        method_options("dpb", {})


def test_options_have_defaults():
    assert method_options("dynamics", {}) == {"alpha": 0.2}
    assert method_options("dynamics", {"alpha": None, "temperature": None}) == {"alpha": 0.2}
    assert method_options("dynamics", {"alpha": 0.0}) == {"alpha": 0.0}
    assert method_options("dbp", {"temperature": 0.5, "alpha": None}) == {"temperature": 0.5}
    assert method_options("random", {}) == {}
    assert METHODS["dynamics"].options["alpha"] == 0.2, "what a user gives must not stick"


@every_method
@pytest.mark.parametrize("option", ["alpha", "temperature", "tau"])
def test_options_of_other_methods_are_refused(name, option):
    if option in METHODS[name].options:
        assert method_options(name, {option: 0.5})[option] == 0.5
    else:
        with pytest.raises(UserError, match=rf"--{option} does nothing with method '{name}'"):
            method_options(name, {option: 0.5})


@pytest.mark.parametrize("alpha", [-0.01, 1.01, math.nan, math.inf])
def test_alpha_out_of_bounds_is_refused(alpha):
    with pytest.raises(UserError, match=rf"--alpha {alpha}: must lie in \[0, 1\]"):
        method_options("dynamics", {"alpha": alpha})


@pytest.mark.parametrize("temperature", [0.0, -1.0, 0.00009, math.nan, math.inf])
def test_temperature_out_of_bounds_is_refused(temperature):
    with pytest.raises(UserError, match=rf"--temperature {temperature}: must be a finite number"):
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
