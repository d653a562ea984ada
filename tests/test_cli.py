"""The commands as a user runs them: in this process, except where a process of their own is the point."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from tailwise.cli import COMMANDS
from tailwise.cli.app import tree
from tailwise.cli.panels import PANELS, STEPS


@pytest.fixture(scope="module")
def run(run_tailwise):
    """`run(*words, code=0)` → the standard output of a command, or the standard error of one that fails."""

    def run(*words, code=0):
        done = run_tailwise(*words, code=code)
        if code == 2 and done.stderr.startswith("tailwise:"):
            assert done.stderr.count("\n") == 1
        return done.stdout if code == 0 else done.stderr

    return run


@pytest.fixture(scope="module")
def pool(tmp_path_factory, make_tar, make_embeddings, make_image):
    """300 samples, 15 of which need something said about them."""
    folder = tmp_path_factory.mktemp("cli")
    random = np.random.default_rng(0)
    groups = random.permutation(np.repeat(np.arange(6), [130, 80, 45, 24, 13, 8]))
    members = []
    for row, group in enumerate(groups):
        members += [(f"{row:04d}.jpg", make_image(int(group))), (f"{row:04d}.txt", f"group {group}".encode())]
    members += [("lonely.txt", b"no image"), ("0000.jpg", b"again"), ("0000.txt", b"again")]
    make_tar(folder / "shards" / "00000.tar", members)
    axes = np.linalg.qr(random.normal(size=(8, 8)))[0]
    rows = axes[groups] + random.normal(scale=0.05, size=(300, 8))
    vectors = {f"{row:04d}": rows[row] for row in range(300)}
    vectors["0007"] = np.full(8, np.nan)
    del vectors["0008"]
    vectors["stranger"] = rows[0]
    make_embeddings(folder / "embeddings", vectors, dtype="float32")
    return folder


def test_the_five_commands(run, pool, tmp_path):
    catalog = tmp_path / "catalog"
    printed = run("import", pool / "shards", pool / "embeddings", catalog)
    assert "imported 300 samples in 1 shards" in printed
    assert "298 of 300 samples, 8 dimensions" in printed
    for reason in (
        "caption without image",
        "duplicate key",
        "NaN or Inf",
        "sample without embedding",
        "embedding without sample",
    ):
        assert reason in printed
    assert "6 clusters, of 298 samples" in run("cluster", catalog, "--clusters", 6)
    assert "2 samples have no embedding" in run("cluster", catalog, "--clusters", 6)
    assert "budget 75 of 300 samples (25.0% of the pool; 298 samples can be drawn: 2 in no group)" in run(
        "plan", catalog, "subset", "--method", "dbp", "--keep", 0.25
    )
    assert "150 of 300" in run("plan", catalog, "epochs", "--method", "dynamics", "--keep", 0.5)
    told = json.loads(run("explain", catalog, "epochs", "--epochs", 3, "--clusters", "--json"))
    assert [epoch["total"] for epoch in told["epochs"]] == [150] * 3
    assert sum(item["size"] for item in told["cluster_list"]) == 298
    run("draw", catalog, "epochs", "--epoch", 2, "--output", tmp_path / "e.parquet")
    assert sum(pq.read_table(tmp_path / "e.parquet")["copies"].to_pylist()) == 150
    run("export", catalog, "subset", tmp_path / "s.txt", "--to", "keys")
    assert len((tmp_path / "s.txt").read_text().splitlines()) == 75
    told = run("export", catalog, "epochs", tmp_path / "s.npy", "--to", "datacomp", "--epoch", 0, code=2)
    assert "has none: export --to shards" in told
    for command in (("export", catalog, "epochs", tmp_path / "e.txt", "--to", "keys"),
                    ("draw", catalog, "epochs", "--output", tmp_path / "e2.parquet")):  # fmt: skip
        assert "the epochs of plan 'epochs' differ: name the one to write with --epoch" in run(*command, code=2)
    run("export", catalog, "epochs", tmp_path / "r.json", "--to", "rates-json")
    assert "150 of 300" in run("plan", catalog, "theirs", "--rates", tmp_path / "r.json")
    status = json.loads(run("status", catalog, "--json"))
    assert [item["name"] for item in status["plans"]] == ["epochs", "subset", "theirs"]
    assert {item["reason"]: item["rows"] for item in status["left out"]}["duplicate key"] == 1
    for words in ("subset", "theirs"):
        assert "epochs (" in run("explain", catalog, words)
    assert "complete" in run("status", catalog)


def test_each_command_names_the_next_one(run, pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, followed = ["import", pool / "shards", pool / "embeddings", "my catalog"], []
    while len(followed) < 4:
        line = run(*words).splitlines()[-1]
        words = shlex.split(line.removeprefix("next: tailwise "))
        followed.append(words[:2])
    assert followed == [[command, "my catalog"] for command in ("cluster", "plan", "explain", "train")]
    for option in ("--quiet", "--json"):
        assert "next:" not in run("status", "my catalog", option)
    tried = run("filter", "my catalog", "--by", "caption-words", "--max", 9, "--dry-run")
    assert tried.endswith("next: tailwise filter 'my catalog' --by caption-words --max 9\n")


def test_embedding_from_the_shards(run, pool, tmp_path):
    run("import", pool / "shards", tmp_path / "catalog")
    assert "no image embeddings" in run("cluster", tmp_path / "catalog", "--clusters", 3, code=2)
    assert "300 of 300" in run("embed", tmp_path / "catalog", "--encoder", "pixels", "--workers", 2)
    assert "0 of 0" in run("embed", tmp_path / "catalog", "--encoder", "pixels")
    assert "6 clusters" in run("cluster", tmp_path / "catalog", "--clusters", 6)
    assert "nothing new" in run("import", pool / "shards", tmp_path / "catalog")
    error = run("import", pool / "shards", pool / "embeddings", tmp_path / "catalog", code=2)
    assert "encoders can't be mixed" in error


def test_relocated_shards_are_found_again(run, pool, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "00000.tar").write_bytes((pool / "shards" / "00000.tar").read_bytes())
    run("import", moved, tmp_path / "catalog")
    moved.rename(tmp_path / "elsewhere")
    assert "1 paths" in run("relocate", tmp_path / "catalog", moved, tmp_path / "elsewhere")
    assert "300 of 300" in run("embed", tmp_path / "catalog", "--encoder", "pixels", "--workers", 1)
    (tmp_path / "empty").mkdir()
    assert "no shard's path begins with" in run(
        "relocate", tmp_path / "catalog", "/nowhere", tmp_path / "empty", code=2
    )
    assert "no path changed" in run("relocate", tmp_path / "catalog", "/nowhere", tmp_path)  # a repeated relocate
    assert "doesn't exist: move" in run("relocate", tmp_path / "catalog", tmp_path, "/nowhere", code=2)
    assert "give the old leading folder" in run("relocate", tmp_path / "catalog", "/", tmp_path, code=2)
    assert "files are what was written" in run("verify", tmp_path / "catalog")


def test_mistakes_are_one_line_and_exit_code_2(run, pool, tmp_path):
    catalog = tmp_path / "catalog"
    (tmp_path / "empty").mkdir()
    assert "nothing to import in" in run("import", tmp_path / "empty", catalog, code=2)
    assert "does not exist" in run("import", tmp_path / "missing", catalog, code=2)
    assert "at least one SOURCE" in run("import", catalog, code=2)
    assert "is no catalog" in run("status", tmp_path / "empty", code=2)
    (tmp_path / "garbage.tar").write_bytes(b"garbage" * 1000)
    assert "not a tar" in run("import", tmp_path / "garbage.tar", catalog, code=2)
    assert "holds no samples" in run("import", pool / "embeddings", catalog, code=2)
    run("import", pool / "shards", pool / "embeddings", catalog)
    assert "no clustering named 'main' (there: none)" in run(
        "plan", catalog, "p", "--method", "dbp", "--keep", 0.5, code=2
    )
    assert "no plan named 'p' (there: none)" in run("explain", catalog, "p", code=2)
    assert "--max-memory '8'" in run("cluster", catalog, "--clusters", 3, "--max-memory", "8", code=2)
    extends = ("cluster", catalog, "--extends", "main", "--name", "more")
    assert "--max-memory does nothing with --extends" in run(*extends, "--max-memory", "16GB", code=2)
    for idle in (("--seed", 0), ("--rule", "greedy"), ("--clustering", "main")):  # defaults, which do nothing either
        assert f"{idle[0]} does nothing with --exact" in run("dedup", catalog, "--exact", "bytes", *idle, code=2)
    assert "--overwrite does nothing without --plot" in run("explain", catalog, "p", "--overwrite", code=2)
    assert "give a --method: one of" in run("plan", catalog, "p", code=2)
    assert "--keep does nothing with method 'rates'" in run(
        "plan", catalog, "p", "--rates", "x.json", "--keep", 0.5, code=2
    )
    assert "--max-memory 'infGB'" in run("cluster", catalog, "--clusters", 3, "--max-memory", "infGB", code=2)
    assert "use auto, cpu, cuda" in run("cluster", catalog, "--clusters", 3, "--device", "meta", code=2)
    assert "--clusters does nothing with method 'random'" in run(
        "plan", catalog, "p", "--method", "random", "--keep", 0.5, "--clusters", "x", code=2
    )
    run("plan", catalog, "r", "--method", "random", "--keep", 0.5)
    assert "must lie between 0 and 10,000" in run(
        "draw", catalog, "r", "--epoch", 10**9, "--output", tmp_path / "x", code=2
    )
    assert "is in the catalog" in run("draw", catalog, "r", "--epoch", 0, "--output", catalog / "x.parquet", code=2)
    assert "can't name an artifact" in run("explain", catalog, "../clusters/main", code=2)
    (catalog / "plans" / "r" / "group.npy").write_bytes(b"")
    assert "group.npy is damaged" in run("draw", catalog, "r", "--epoch", 0, "--output", tmp_path / "x", code=2)
    (catalog / "shards.parquet").unlink()
    assert "has 0 of 1 shards" in run("status", catalog, code=2)
    assert "No such option" in run("plan", catalog, "p", "--metod", "dbp", code=2)


def test_help_answers_without_importing_anything_heavy():
    code = (
        "import sys, tailwise.cli, tailwise\n"
        "heavy = {'numpy', 'torch', 'pyarrow', 'numba', 'fsspec', 'PIL', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_commands_without_products_of_matrices_do_not_import_torch(pool, tmp_path):
    """It takes seconds, longer than most of these commands."""
    catalog = str(tmp_path / "catalog")
    commands = [
        ["import", str(pool / "shards"), catalog, "--workers", "1"],
        ["filter", catalog, "--by", "caption-words", "--min", "1"],
        ["plan", catalog, "p", "--method", "random", "--keep", "0.5", "--without", "caption-words"],
        ["explain", catalog, "p"],
        ["draw", catalog, "p", "--epoch", "0", "--output", str(tmp_path / "epoch.parquet")],
        ["excluded", catalog, "p", "--output", str(tmp_path / "excluded.parquet")],
        ["status", catalog],
        ["verify", catalog],
    ]
    code = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from tailwise.cli import app\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    done = CliRunner().invoke(app, words)\n"
        "    assert not done.exit_code, (done.output, done.exception)\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr


def test_the_program_prints_and_exits_as_the_function_does(run_tailwise, tmp_path):
    for words, code in ((["--version"], 0), (["status", "--help"], 0), (["status", tmp_path], 2), (["statsu"], 2)):
        command = [sys.executable, "-m", "tailwise", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        same = run_tailwise(*words, code=code)
        assert done.returncode == same.returncode
        assert done.stderr == same.stderr
        assert done.stdout == same.stdout


def test_help_shows_examples_and_panels_that_are_short(run):
    assert run("-h") == run("--help")
    shown = re.findall("─ (.+?) ─|^│ ([a-z]+) ", run("-h"), re.MULTILINE)
    listed = [panel or command for panel, command in shown]
    assert listed[2:] == [each for step, commands in STEPS.items() for each in (step, *commands)]
    for command in COMMANDS:
        assert f"\n tailwise {command} " in run(command, "-h")
        found = {item.opts[0].removeprefix("--"): item.rich_help_panel for item in tree().commands[command].params}
        assert {name: found.get(name) for name in PANELS[command]} == PANELS[command]
        assert max(Counter(found.values()).values()) <= 11


@pytest.fixture
def shell(tmp_path):
    """`shell(script, **environment)` → what bash prints, with `tailwise` on its path and a home of its own."""
    product = tmp_path / "bin" / "tailwise"
    product.parent.mkdir()
    product.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tailwise "$@"\n')
    product.chmod(0o755)
    home = {**os.environ, "HOME": str(tmp_path), "PATH": f"{product.parent}:{os.environ['PATH']}"}

    def shell(script, **environment):
        command = ["bash", "--norc", "-c", script]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=home | environment).stdout

    return shell


def test_bash_completes_what_is_installed(shell, run, pool, tmp_path):
    run("import", pool / "shards", tmp_path / "cat")
    run("plan", tmp_path / "cat", "mine", "--method", "random", "--keep", 0.5)
    assert "bash completion installed" in shell("tailwise --install-completion; true")
    asked = "COMP_WORDS=({words}); COMP_CWORD={at}; _tailwise_completion tailwise; echo ${{COMPREPLY[@]}}\n"
    script = asked.format(words="tailwise pl", at=1) + asked.format(words="tailwise plan cat p --max-", at=4)
    script += asked.format(words=f"tailwise explain {tmp_path / 'cat'} m", at=3)
    assert shell(f". ~/.bashrc; {script}").split() == ["plan", "--max-repeats", "--max-rejected", "mine"]


def test_zsh_and_fish_are_completed(shell):
    """As their scripts ask, which this machine may have no shell for."""
    assert "compdef _tailwise_completion tailwise" in shell("tailwise", _TAILWISE_COMPLETE="source_zsh")
    assert "_TAILWISE_COMPLETE=complete_fish" in shell("tailwise", _TAILWISE_COMPLETE="source_fish")
    zsh = {"_TAILWISE_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "tailwise ren"}
    assert '"rename":"Rename an artifact' in shell("tailwise", **zsh)
    fish = {"_TAILWISE_COMPLETE": "complete_fish", "_TYPER_COMPLETE_ARGS": "tailwise ren"}
    assert shell("tailwise", **fish, _TYPER_COMPLETE_FISH_ACTION="get-args").startswith("rename\tRename an artifact")


def test_a_store_that_cannot_be_reached_completes_nothing(shell):
    pytest.importorskip("obstore", reason="needs the extra s3: obstore")
    server = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
    }
    asked = {"_TAILWISE_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert not shell(
        "tailwise 2>&1", **server, **asked, _TYPER_COMPLETE_ARGS="tailwise explain s3://pool/catalog "
    ).strip()


def test_the_python_api_has_the_same_verbs():
    import tailwise

    for name in tailwise.__all__:
        assert getattr(tailwise, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tailwise.nothing


@pytest.mark.parametrize("workers_there", [0, 1, 6])
def test_control_c_says_how_to_go_on(pool, tmp_path, workers_there, wait_until, descendants):
    """To the whole process group, while workers are being started and afterwards; a second signal changes nothing."""
    script = (
        "import os, signal, sys, time, tailwise.cli, tailwise.execution.local as local\n"
        "from tailwise.execution.base import Apply, Needs\n"
        "real = local.LocalExecutor.map\n"
        "slow = lambda self, *_: real(self, Apply(time.sleep), [5] * 40, Needs(workers=6))  # shards that take long\n"
        "local.LocalExecutor.map = slow\n"
        "show = tailwise.cli.print_error\n"
        "tailwise.cli.print_error = lambda line: (os.kill(os.getpid(), signal.SIGTERM), show(line))\n"
        "sys.argv[0] = 'tailwise'\n"
        "if __name__ == '__main__': print('ready', flush=True); tailwise.cli.main()"
    )
    file = tmp_path / "main.py"
    file.write_text(script)
    process = subprocess.Popen(
        [sys.executable, file, "import", pool / "shards", tmp_path / "catalog"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    wait_until(
        lambda: len(descendants(process.pid)) > workers_there, lambda: process.poll() is None
    )  # and a resource tracker
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=300)[1]
    assert (process.returncode, error) == (1, "tailwise: interrupted; run the same command again to go on\n")


def test_without_a_place_for_compiled_code(run, pool, tmp_path):
    code = (
        "import numba.core.caching as c\n"
        "(getattr(c, 'CacheImpl', None) or c._CacheImpl)._locator_classes = []\n"
        "import sys, tailwise.cli; sys.argv[0] = 'tailwise'; tailwise.cli.main()"
    )
    run("import", pool / "shards", tmp_path / "catalog")
    command = [sys.executable, "-c", code, "plan", tmp_path / "catalog", "p", "--method", "random", "--keep", "0.5"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "150 of 300" in result.stdout


def test_a_terminal_that_knows_only_ascii(run, pool, tmp_path):
    run("import", pool / "shards", pool / "embeddings", tmp_path / "catalog")
    run("cluster", tmp_path / "catalog", "--clusters", 6)
    run("plan", tmp_path / "catalog", "p", "--method", "flat", "--keep", 0.5)
    command = [sys.executable, "-m", "tailwise", "explain", tmp_path / "catalog", "p"]
    result = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"8 ? 130" in result.stdout or b"head" in result.stdout
