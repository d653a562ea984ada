"""The log, --quiet, --verbose and progress without a terminal: as a user meets them."""

import json
import logging
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest

from tailwise.progress import silent
from tailwise.requests import ClusterRequest


@pytest.fixture(scope="module")
def catalog(run_tailwise, tmp_path_factory, make_tar, make_embeddings, make_image):
    """A catalog of two tars with 120 samples."""
    folder = tmp_path_factory.mktemp("output")
    for tar in range(2):
        members = [
            (f"{tar}{row:03d}.{end}", make_image(row) if end == "jpg" else b"words")
            for row in range(60)
            for end in ("jpg", "txt")
        ]
        make_tar(folder / "shards" / f"{tar:05d}.tar", members)
    rows = np.random.default_rng(0).normal(size=(120, 8))
    keys = [f"{tar}{row:03d}" for tar in range(2) for row in range(60)]
    make_embeddings(folder / "embeddings", dict(zip(keys, rows, strict=True)))
    run_tailwise("import", folder / "shards", folder / "embeddings", folder / "catalog", "--workers", 2)
    return folder / "catalog"


@pytest.mark.parametrize("first", [True, False])
def test_quiet_prints_nothing_but_json_and_errors(run_tailwise, catalog, first):
    def quietly(*words, code=0):
        return run_tailwise(*(["--quiet"] * first), *words, *(["--quiet"] * (not first)), code=code)

    done = quietly("cluster", catalog, "--k", 4, "--name", f"quiet-{first}")
    assert (done.stdout, done.stderr) == ("", "")
    found = quietly("status", catalog, "--json")
    assert json.loads(found.stdout) and not found.stderr
    wrong = quietly("explain", catalog, "absent", code=2)
    assert wrong.stdout == "" and wrong.stderr.startswith("tailwise: ") and wrong.stderr.count("\n") == 1
    assert quietly("--version").stdout.startswith("tailwise ")


@pytest.mark.parametrize("first", [True, False])
def test_verbose_shows_the_log_on_standard_error(run_tailwise, catalog, first):
    words = ["cluster", catalog, "--k", 5, "--name", f"verbose-{first}"]
    told = run_tailwise(*(["--verbose"] * first), *words, *(["--verbose"] * (not first)))
    lines = told.stderr.splitlines()
    assert all(re.match(r"tailwise: debug: \d+\.\d s, tailwise[.\w]*: ", line) for line in lines)
    assert f"{catalog}/clusters/verbose-{first} is written" in told.stderr
    assert any("assigning: " in line for line in lines)
    assert "debug" not in told.stdout
    plain = run_tailwise("cluster", catalog, "--k", 5, "--name", f"plain-{first}")
    assert plain.stderr == ""
    assert plain.stdout.count("\n") == told.stdout.count("\n") > 1


def test_mistakes_with_shared_options(run_tailwise):
    assert "cannot be combined" in run_tailwise("--quiet", "status", ".", "--verbose", code=2).stderr
    assert "no command is given" in run_tailwise("--quiet", code=2).stderr
    shown = run_tailwise("--help").stdout
    assert "--quiet" in shown and "--verbose" in shown


def test_the_executor_is_chosen_before_or_after_a_command(run_tailwise, catalog, monkeypatch):
    from tailwise.cli import _how_to_resume, _shared_first

    words = ["train", "c", "--executor", "ray", "p", "--ray-address=auto", "--", "--executor", "x"]
    assert _shared_first(words) == [
        "--executor",
        "ray",
        "--ray-address=auto",
        "train",
        "c",
        "p",
        "--",
        "--executor",
        "x",
    ]
    assert _how_to_resume(["--executor", "train", "verify", "c"]) == "run the same command again to go on"
    for line in (["--executor", "rai", "verify", catalog], ["verify", catalog, "--executor=rai"]):
        assert "tailwise: --executor 'rai': did you mean 'ray'" in run_tailwise(*line, code=2).stderr
    monkeypatch.setenv("TAILWISE_EXECUTOR", "rai")
    for command in ("verify", "status"):  # one that runs no work, too
        assert "--executor 'rai'" in run_tailwise(command, catalog, code=2).stderr
    run_tailwise("verify", catalog, "--executor", "local")


def test_words_after_two_dashes_stay():
    from tailwise.cli import _how_to_resume, _shared_first

    words = ["train", "c", "p", "--verbose", "--", "--model", "m", "--quiet"]
    assert _shared_first(words) == ["--verbose", "train", "c", "p", "--", "--model", "m", "--quiet"]
    assert _how_to_resume(["--quiet", "train", "c", "p", "--", "--model", "m"]) == (
        "to go on, run: tailwise --quiet train c p --resume -- --model m"
    )


WARNING = """
import logging, sys
import tailwise.cli as cli
from tailwise.execution.base import Apply, Needs
from tailwise.execution.local import LocalExecutor
from tailwise.storage.remote import logger

@cli.app.command("status")
def status():
    logger.info("a note\\x1b[2J")
    logger.warning("first of\\ntwo lines")
    logging.getLogger("other").warning("of a library")
    list(LocalExecutor().map(Apply(logging.getLogger("tailwise.worker").warning), ["in worker 1", "in worker 2"], Needs(workers=2)))

if __name__ == "__main__":
    sys.argv = ["tailwise", "status", *sys.argv[1:]]
    cli.main()
"""


@pytest.mark.parametrize("option", [None, "--quiet", "--verbose"])
def test_warnings_are_one_line_each_in_all_processes(tmp_path, option):
    (tmp_path / "main.py").write_text(WARNING)
    command = [sys.executable, tmp_path / "main.py", *([option] if option else [])]
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}  # each write is one of the system: a line must be one write
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=unbuffered)
    lines = [line for line in found.stderr.splitlines() if ": debug: " not in line]
    expected = ["tailwise: warning: first of\\ntwo lines", "of a library"]
    expected += [f"tailwise: warning: in worker {number}" for number in (1, 2)]
    assert sorted(lines) == sorted(expected + ["a note\\x1b[2J"] * (option != "--quiet"))
    assert found.stdout == ""


def test_the_library_sets_up_no_log():
    code = (
        "import logging, tailwise.cli, tailwise.loader, tailwise.train.launch, tailwise.compare.study\n"
        "log = logging.getLogger('tailwise')\n"
        "print(log.handlers, log.level, log.propagate, logging.root.handlers)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[] 0 True []\n"


SLOW = """
import sys, time
import tailwise.cli as cli, tailwise.progress as progress
from tailwise.cli.app import with_progress
from tailwise.cli.printing import print_json

def work(track):
    for _ in track([0] * 40, "sleeping \\x1b[2J", 40):
        time.sleep(0.02)
    for _ in track((number for number in range(20)), "waiting"):
        time.sleep(0.02)
    for _ in track(range(10), "training", 10, size=8, unit="samples", later=2):
        time.sleep(0.03)
    for _ in track(range(100), "short", 100):
        pass

@cli.app.command("status")
def status():
    work(with_progress().progress)
    print_json({"a": 1})

progress.LINE_SECONDS = float(sys.argv.pop(1))
cli.main()
"""


@pytest.fixture
def slow(tmp_path):
    """`slow(seconds, *words)` → the command of a program with slow steps that logs progress at such intervals."""
    (tmp_path / "slow.py").write_text(SLOW)
    return lambda seconds, *words: [sys.executable, tmp_path / "slow.py", str(seconds), "status", *words]


def test_without_a_terminal_progress_is_a_line_at_intervals(slow):
    found = subprocess.run(slow(0.1), capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == {"a": 1}
    sleeping = [line for line in found.stderr.splitlines() if line.startswith("sleeping")]
    waiting = [line for line in found.stderr.splitlines() if line.startswith("waiting")]
    pattern = r"sleeping \\x1b\[2J: (\d+) of 40, ([\d.]+)/s, 0:0\d:\d\d left"
    shown = [re.fullmatch(pattern, line) for line in sleeping]
    assert all(shown) and 2 <= len(shown) <= 40
    done = [int(match[1]) for match in shown]
    assert done == sorted(set(done))
    assert all(0 < float(match[2]) <= 50 for match in shown)
    assert all(re.fullmatch(r"waiting: \d+, [\d.]+/s", line) for line in waiting) and waiting
    training = [line for line in found.stderr.splitlines() if line.startswith("training")]
    pattern = r"training: \d+ of 80 samples, [\d.]+ samples/s, 0:00:0\d left, 0:00:0[01] for all"
    assert all(re.fullmatch(pattern, line) for line in training) and training
    assert len(sleeping) + len(waiting) + len(training) == found.stderr.count("\n")  # nothing for the short step

    for command in (slow(0.1, "--quiet"), slow(60)):  # a step that ends before its first line says nothing
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(found.stdout) == {"a": 1}
        assert found.stderr == ""


def test_a_terminal_shows_bars(slow):
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(slow(0.1), stdout=subprocess.PIPE, stderr=child, env=environment) as process:
        os.close(child)
        shown = b""
        try:
            while piece := os.read(parent, 65536):
                shown += piece
        except OSError:  # the process has ended
            pass
        finally:
            os.close(parent)
        assert json.loads(process.stdout.read()) == {"a": 1}
    assert "━".encode() in shown and b"40 of 40, " in shown


def test_tables_of_figures_fit_60_columns(run_tailwise, catalog):
    run_tailwise("cluster", catalog, "--k", 12, "--name", "wide")
    run_tailwise("plan", catalog, "wide", "--method", "dynamics", "--keep", 0.3, "--clustering", "wide")
    explained = run_tailwise("explain", catalog, "wide").stdout
    assert (
        "method dynamics (alpha 0.2) over 'wide', snapshot 1\nanother draw in each epoch; exact counts; " in explained
    )
    suggested = run_tailwise("dedup", catalog, "--suggest", "--clustering", "wide").stdout
    rows = [line for line in (explained + suggested).splitlines() if re.match(r"[\w.]+  +[\d–]|─", line)]
    assert len(rows) > 30 and max(map(len, rows)) <= 60


def test_python_callers_see_nothing(capfd, catalog):
    from tailwise.catalog import Catalog
    from tailwise.steps.clustering.cluster import cluster

    cluster(Catalog.open(catalog), ClusterRequest(k=3, name="python"))
    assert capfd.readouterr() == ("", "")
    assert list(silent([1, 2], "step")) == [1, 2]
    assert logging.getLogger("tailwise").handlers == []


def test_keys_are_utf_8_in_a_locale_that_knows_ascii_only(tmp_path, make_tar):
    key = "größe-鍵"
    make_tar(tmp_path / "a.tar", [(f"{key}.jpg", b"x"), (f"{key}.txt", "ein Maß".encode())])
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for words in (["import", tmp_path / "a.tar", tmp_path / "cat"], ["why", tmp_path / "cat", key]):
        command = [sys.executable, "-m", "tailwise", *map(str, words)]
        done = subprocess.run(command, capture_output=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
    assert b"sample gr??e-? (uid" in done.stdout  # as far as the terminal knows letters
