import pytest
import torch

from tailwise.devices import ALLOWED, DEVICE_NAME, find_device, find_devices
from tailwise.errors import UserError


@pytest.fixture(params=[0, 1, 3])
def count(request, monkeypatch):
    """Number of CUDA devices that torch reports."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


def test_names(count):
    assert str(find_device("auto")) == ("cuda" if count else "cpu")
    assert str(find_device("cpu")) == str(find_device("cpu", any_kind=True)) == "cpu"
    for name, needed in {"cuda": 1, "cuda:0": 1, "cuda:2": 3}.items():
        if count >= needed:
            assert str(find_device(name)) == name
        else:
            with pytest.raises(UserError, match=f"`device` '{name}' cannot be used: .*CUDA devices here: {count}$"):
                find_device(name)


def test_a_model_runs_on_all_cuda_devices(count):
    several = [f"cuda:{at}" for at in range(count)] if count > 1 else ["cuda" if count else "cpu"]
    assert [str(device) for device in find_devices("auto")] == several
    if count > 1:
        assert [str(device) for device in find_devices("cuda")] == several
    assert [str(device) for device in find_devices("cpu")] == ["cpu"]


@pytest.mark.parametrize("name", ["", "tpu", "cuda:", "cuda:-1", "cuda:x", "cuda:01", "CPU", "meta", "cpu:0\n"])
@pytest.mark.parametrize("any_kind", [False, True])
def test_other_names_are_refused_in_one_line_with_the_allowed_ones(name, any_kind):
    assert not DEVICE_NAME.fullmatch(name)
    with pytest.raises(UserError) as caught:
        find_device(name, any_kind=any_kind)
    assert f"`device` {name!r} cannot be used" in str(caught.value)
    assert ALLOWED in str(caught.value)
    assert "\n" not in str(caught.value)
