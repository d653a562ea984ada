import threading

import pytest
import torch

from tailwise.kernels.screening import full_precision
from tailwise.kernels.threads import Shared, map_in_order, run_tiles


def test_a_shared_change_holds_until_the_last_is_done():
    log = []

    def change():
        log.append("made")
        return lambda: log.append("taken back")

    shared = Shared(change)
    inside, leave = threading.Event(), threading.Event()

    def other():
        with shared():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with shared():
        thread.start()
        inside.wait()
    assert log == ["made"]
    leave.set()
    thread.join()
    assert log == ["made", "taken back"]


def test_the_users_precision_survives_side_by_side():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:

        def work(_item, _threads):
            with full_precision():
                return torch.get_float32_matmul_precision()

        list(map_in_order(work, range(200), 4, lambda _: False))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_earliest_failure_is_raised_and_threads_are_given_back(threads):
    before = torch.get_num_threads()

    def work(tile, _):
        if tile in {7, 9}:
            raise ValueError(tile)

    with pytest.raises(ValueError, match="7"):
        run_tiles(work, range(20), threads, lambda: None)
    assert torch.get_num_threads() == before
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]


def test_results_come_in_order_and_large_items_have_all_threads():
    found = list(map_in_order(lambda item, threads: (item, threads), range(50), 2, lambda item: item % 10 == 0))
    assert found == [(item, 2 if item % 10 == 0 else 1) for item in range(50)]
