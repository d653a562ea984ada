"""The local executor: order, bounded look-ahead, errors. Functions are the standard library's, since workers import them anew."""

import math
import operator
import os
import signal
import subprocess
import sys
import time

import pytest

from tailwise.execution.base import Apply, Needs, default_workers
from tailwise.execution.local import LocalExecutor, WorkerLostError


def map_ordered(function, items, workers):
    return LocalExecutor().map(Apply(function), items, Needs(workers=workers))


def test_two_workers_keep_the_order_and_look_ahead_by_six(counting):
    items = counting(range(40))
    results = []
    for done, result in enumerate(map_ordered(operator.neg, items, 2)):
        results.append(result)
        assert items.taken <= done + 6
    assert results == [-item for item in range(40)]


def test_two_workers_are_other_processes():
    pids = set(map_ordered(eval, ["__import__('os').getpid()"] * 8, 2))
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2


def test_results_come_in_order_even_if_later_ones_are_ready_first():
    delays = ["(__import__('time').sleep(0.3), 0)[1]", "1", "2", "3"]
    assert list(map_ordered(eval, delays, 2)) == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_come_through_in_their_place(workers):
    results = map_ordered(math.sqrt, [1.0, 4.0, -1.0, 9.0], workers)
    assert [next(results), next(results)] == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"domain error|nonnegative"):
        next(results)


def test_leaving_early_ends_the_workers():
    results = map_ordered(operator.neg, list(range(100)), 2)
    assert next(results) == 0
    results.close()


def test_one_worker_runs_in_this_process_and_only_as_asked(counting):
    items = counting(range(10))
    results = map_ordered(lambda item: (item, os.getpid()), items, 1)
    assert [next(results), next(results)] == [(0, os.getpid()), (1, os.getpid())]
    assert items.taken <= 2


def test_one_item_needs_no_process():
    assert list(map_ordered(lambda item: (item, os.getpid()), ["x"], 8)) == [("x", os.getpid())]


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_nothing_to_do(workers):
    assert list(map_ordered(operator.neg, [], workers)) == []


def test_default_workers():
    assert 1 <= default_workers() <= (os.cpu_count() or 1)


def test_workers_end_with_a_killed_parent(tmp_path, wait_until, descendants, running):
    file = tmp_path / "main.py"
    file.write_text(
        "import time\nfrom tailwise.execution.base import Apply, Needs\nfrom tailwise.execution.local import LocalExecutor\n"
        "if __name__ == '__main__': list(LocalExecutor().map(Apply(time.sleep), [60] * 4, Needs(workers=2)))"
    )
    process = subprocess.Popen([sys.executable, file], start_new_session=True)
    wait_until(lambda: len(descendants(process.pid)) == 3, lambda: process.poll() is None)
    workers = descendants(process.pid)
    time.sleep(2)  # they import what they need
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(map(running, workers)))


def run_script(tmp_path, text):
    file = tmp_path / "main.py"
    file.write_text(text)
    return subprocess.run([sys.executable, file], capture_output=True, text=True, check=False, timeout=100)


def test_the_first_worker_never_sees_ctrl_c_either(tmp_path):
    """With the first one `multiprocessing` starts a tracker, and unblocks the signal on that occasion."""
    result = run_script(
        tmp_path,
        "import multiprocessing, signal\nfrom tailwise.execution.local import starting_workers\n"
        "tell = 'import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)'\n"
        "process = multiprocessing.get_context('spawn').Process(target=exec, args=(tell,))\n"
        "with starting_workers(): process.start()\n"
        "process.join()\n"
        "exec(tell)\n",
    )
    assert (result.stdout, result.stderr) == ("True\nFalse\n", "")


def test_a_script_needs_no_guard(tmp_path):
    """Workers don't run the user's script again."""
    result = run_script(
        tmp_path,
        "import operator\nfrom tailwise.execution.base import Apply, Needs\nfrom tailwise.execution.local import LocalExecutor\n"
        "print('once', list(LocalExecutor().map(Apply(operator.neg), [1, 2, 3], Needs(workers=2))))\n",
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "once [-1, -2, -3]\n", "")


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_an_interrupt_while_workers_start_is_answered_afterwards(tmp_path, number):
    result = run_script(
        tmp_path,
        "import os, signal\nfrom tailwise.execution.local import starting_workers\n"
        f"def answer(*_): print('answered')\nsignal.signal(signal.{number}, answer)\n"
        "with starting_workers():\n"
        f"    os.kill(os.getpid(), signal.{number})\n"
        "    print('started')\n",
    )
    assert (result.stdout, result.stderr) == ("started\nanswered\n", "")


def test_an_interrupt_that_ends_the_process_does_so_afterwards(tmp_path):
    result = run_script(
        tmp_path,
        "import os, signal\nfrom tailwise.execution.local import starting_workers\n"
        "with starting_workers():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('started', flush=True)\n"
        "print('not reached')\n",
    )
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "started\n")


def test_work_of_a_killed_worker_is_repeated(tmp_path):
    marker = str(tmp_path / "killed")
    kill = f"(open({marker!r}, 'x'), __import__('os').kill(__import__('os').getpid(), 9))"
    items = [str(number) for number in range(9)]
    items[4] = f"4 if __import__('os').path.exists({marker!r}) else {kill}"
    assert list(map_ordered(eval, items, 2)) == list(range(9))


def test_workers_that_die_again_and_again_end_the_run_with_one_line():
    kill = "__import__('os').kill(__import__('os').getpid(), 9)"
    results = map_ordered(eval, ["0", "1", kill, "3"], 2)
    with pytest.raises(
        WorkerLostError, match=r"3 worker processes in a row died while they worked on .*use fewer `workers`"
    ):
        list(results)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes before Python 3.11")
def test_an_error_names_its_item(workers):
    with pytest.raises(ValueError) as caught:
        list(map_ordered(math.sqrt, [1.0, 4.0, -1.0, 9.0], workers))
    assert caught.value.__notes__ == ["Apply: -1.0"]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_merged_in_workers_and_then_here(workers):
    needs = Needs(workers=workers)
    total = LocalExecutor().reduce(Apply(abs), [-number for number in range(101)], operator.add, needs)
    assert total == 5050


def test_item_i_runs_on_device_i_mod_n(monkeypatch):
    monkeypatch.setattr("tailwise.devices.find_devices", lambda name: [f"{name}:0", f"{name}:1"])
    tell = "(__import__('os').getpid(), __import__('sys').modules['tailwise.execution.local']._own[1].device)"
    found = list(LocalExecutor().map(Apply(eval), [tell] * 7, Needs(device="a")))
    assert [device for _, device in found] == ["a:0", "a:1"] * 3 + ["a:0"]
    assert len({pid for pid, _ in found}) == 2
