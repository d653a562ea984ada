"""Text from the web in every place that holds text: no command obeys it, stumbles over it, or changes it."""

import io
import json
import logging
import re
import subprocess
import sys
import tarfile
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tailwise.cli import COMMANDS, _PlainRecord, app
from tailwise.cli.printing import print_table, say
from tailwise.errors import UserError
from tailwise.text import plain

WORDS = "[/b] [red]x \x1b[31m \x1b]8;;http://e\x07 gpj\u202e :smile: $\\foo$ <script> | =1+1 `c`"
CAPTION = f"{WORDS}\nsecond\rline \x9b2J"
KINDS = ("[/b]\x1b[31m", "[red]x\x07", "=1+1|$\\foo$")
REASON = "see [/issue] \x1b[2J\u202e"


def key(row):
    return f"{row:02d}[/b]\x1b[31m$\\x$|:smile:\u202e"


@pytest.fixture(scope="module")
def pool(tmp_path_factory, make_tar, make_image, make_embeddings):
    """A folder with 24 samples, all of whose texts are hostile, and near-duplicates among them."""
    folder = tmp_path_factory.mktemp("pool") / "p[red]\x1b[31m$\\foo$"
    members = [("\x1b[1m[/i].txt", b"a caption without an image")]
    for row in range(24):
        members += [(f"{key(row)}.jpg", make_image(row)), (f"{key(row)}.txt", CAPTION.encode())]
    make_tar(folder / "shards[x]" / "00000.tar", members, tar_format=tarfile.PAX_FORMAT)
    rows = np.repeat(np.random.default_rng(0).normal(size=(12, 16)), 2, 0)
    rows += 0.02 * np.random.default_rng(1).normal(size=rows.shape)
    make_embeddings(folder / "embeddings", {key(row): rows[row] for row in range(24)})
    lines = [f"{key(row)}\t{KINDS[row % 3]}" for row in range(24)]
    (folder / "kinds.tsv").write_text("\n".join(["key\tkind [/b]", *lines, f"nobody\x1b[0m\t{KINDS[0]}"]) + "\n")
    captions = [f"{key(row)}\t{WORDS} of {row}" for row in range(20)]
    (folder / "captions[x].tsv").write_text("\n".join(["key\tcaption", *captions, f"nobody\x1b[0m\t{WORDS}"]) + "\n")
    (folder / "scores[x].tsv").write_text(
        "\n".join(["key\tsc [/b]", *(f"{key(row)}\t{row}" for row in range(24)), "nobody\x1b[0m\t1"])
    )
    (folder / "gone.txt").write_text(f"{key(0)}\nnobody\x1b[31m[/b]\n")
    (folder / "entries.txt").write_text(f"second\n{WORDS}\n")
    tags = [json.dumps({"key": key(row), "tags": [WORDS, KINDS[row % len(KINDS)]]}) for row in range(20)]
    (folder / "tags[x].jsonl").write_text("\n".join(tags))
    (folder / "metadata[b]").mkdir()
    row = {"uid": ["0" * 32], "clip_l14_similarity_score": [0.5]}
    pq.write_table(pa.table(row), folder / "metadata[b]" / "x.parquet")
    recipe = "name: '[/b]'\nabout: '[red] $\\foo$'\nsteps: [{plan: {name: r, method: random, keep: 0.5}}]\n"
    (folder / "r[b].yaml").write_text(recipe)
    return folder


def commands(pool):
    """[(arguments, texts that must be shown as given)], for every command, in an order in which all work."""
    catalog = pool / "cat"
    shards = pool / "shards[x]"
    return [
        (["import", shards, pool / "embeddings", catalog], [str(catalog)]),
        (["captions", catalog, pool / "captions[x].tsv", "--name", "recap"], []),
        (["concepts", catalog, pool / "tags[x].jsonl", "--name", "tags", "--column", "tags"], []),
        (["group", catalog, "--concepts", "tags"], []),
        (["embed", catalog, "--encoder", "pixels", "--workers", 1], []),
        (["cluster", catalog, "--clusters", 3], []),
        (["dedup", catalog, "--suggest"], ["[/b] [red]x"]),
        (["dedup", catalog, "--epsilon", 0.01], [str(catalog)]),
        (["filter", catalog, "--by", "caption-words", "--max", 99], []),
        (["filter", catalog, "--not", pool / "gone.txt"], [str(pool)]),
        (["score", catalog, "--name", "s", "--file", pool / "scores[x].tsv", "--column", "sc [/b]"], []),
        (["score", catalog, "--name", "m", "--mix", "s\x1b[/b]"], ["s\x1b[/b]"]),
        (["group", catalog, "--by", "kind [/b]", "--file", pool / "kinds.tsv", "--name", "kind"], []),
        (["group", catalog, "--entries", pool / "entries.txt", "--workers", 1], []),
        (["group", catalog, "--suggest", "--workers", 1], []),
        (["plan", catalog, "p", "--method", "flat", "--keep", 0.5, "--clusters", "kind"], [str(catalog)]),
        (["explain", catalog, "p", "--clusters"], KINDS),
        (["report", catalog, "--output", pool / "report[b]"], [str(pool)]),
        (["draw", catalog, "p", "--epoch", 0, "--output", pool / "drawn.parquet"], [str(pool)]),
        (["prepare", catalog, "p"], []),
        (["export", catalog, "p", pool / "rates.json", "--to", "rates-json", "--epoch", 0], [str(pool)]),
        (["export", catalog, "p", pool / "out", "--to", "shards", "--epoch", 0, "--workers", 1], [str(pool)]),
        (["export", catalog, "p", pool / "bundle", "--to", "plan-bundle"], [str(pool)]),
        (["plan", catalog, "shared", "--from", pool / "bundle"], []),
        (["why", catalog, key(3)], [key(3), CAPTION, f"{WORDS} of 3", str(shards)]),
        (["why", catalog, key(99)], ["99[/b]"]),
        (["remove", catalog, "--keys", pool / "gone.txt", "--reason", REASON], ["nobody\x1b[31m[/b]"]),
        (["excluded", catalog, "--output", pool / "excluded.parquet"], [REASON]),
        (["excluded", catalog, "--output", pool / "removed.parquet"], [REASON]),
        (["why", catalog, key(0)], [REASON]),
        (["status", catalog], [REASON]),
        (["verify", catalog], []),
        (["unpack", catalog, pool / "no\x1b[2J"], []),
        (["relocate", catalog, pool / "none[/b]\x1b", pool / "no\x1b[2J"], [str(pool)]),
        (["rename", catalog, "plans/p", "q[/b]\x1b"], ["q[/b]\x1b"]),
        (["delete", catalog, "plans/p", "--dry-run"], ["plans/p"]),
        (["delete", catalog, "plans/no\x1b[/b]"], ["no\x1b[/b]"]),
        (["run", pool / "r[b].yaml", catalog, "--dry-run"], ["[/b]: [red] $\\foo$", str(catalog)]),
        (["baselines", pool / "none[/b]\x1b", pool / "out"], ["is no folder with .parquet files"]),
        (["baselines", pool / "metadata[b]", pool / "subsets[/b]", "--only", "clip_score"], [str(pool)]),
        (["train", catalog, "no\x1b[/b]", "--", "--model", "x\x1b"], []),
        (["evaluate", pool / "no\x1b[/b].pt", "--data", pool], ["no\x1b[/b].pt"]),
        (["compare", pool / "no\x1b[/b].yaml"], ["no\x1b[/b].yaml"]),
        (["demo", pool, "--output", pool / "demo"], [str(pool)]),
    ]


def invoke(arguments):
    """Standard output and errors of a command; its mistakes as `main` shows them."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if isinstance(result.exception, UserError):
        return f"{result.output}tailwise: {result.exception}\n"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def flat(text):
    """The text without white space and frames of tables."""
    return re.sub(r"[\s│┃]", "", text)


def assert_safe(output):
    unsafe = {
        letter for letter in output if letter != "\n" and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl")
    }
    assert not unsafe, (unsafe, output)


def test_no_command_obeys_or_changes_text_of_the_pool(pool, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    table = commands(pool)
    assert {arguments[0] for arguments, _ in table} == set(COMMANDS)
    for arguments, texts in table:
        output = invoke(arguments)
        assert_safe(output)
        assert "{'" not in output  # no Python
        for text in texts:
            assert flat(plain(text)) in flat(output), (arguments, text, output)
    story = json.loads(invoke(["why", pool / "cat", key(0), "--json"]))
    assert story["samples"][0]["key"] == key(0)
    assert story["samples"][0]["removed"]["reason"] == REASON
    assert set(pq.read_table(pool / "removed.parquet")["reason"].to_pylist()) >= {REASON}


def test_json_holds_what_no_terminal_shows(capsys):
    from tailwise.cli.printing import print_json

    values = {"lone": "caf\udce9", "escape": "\x1b[31m", "bell": "\x07"}
    print_json(values)
    assert json.loads(capsys.readouterr().out) == values


def test_lines_and_tables_show_text_as_given(capsys):
    say(CAPTION)
    print_table(CAPTION, ("[b]", "\x1b"), [(CAPTION, (WORDS, "[/b]"))])
    output = capsys.readouterr().out
    assert_safe(output)
    assert flat(output).count(flat(plain(WORDS))) == 4


def test_what_libraries_log_is_shown_safely():
    record = _PlainRecord("n", logging.WARNING, "f", 1, "a %s\nb", ("\x1b[2J",), None)
    assert record.getMessage() == "a \\x1b[2J\nb"


@pytest.mark.parametrize("code", ["import warnings; warnings.warn('W')", "raise KeyError('W')", "logging.warning('W')"])
def test_no_way_out_of_the_process_is_raw(tmp_path, code):
    """Warnings, unexpected errors and logs of libraries, in a process of their own: they replace functions of the whole process."""
    program = (
        "import logging, sys, tailwise.cli as cli\n"
        "@cli.app.command('status')\n"
        f"def status():\n    {code.replace('W', chr(92) + 'x1b[31m' + chr(92) + 'x9b[/b]')}\n"
        "sys.argv = ['tailwise', 'status']\ncli.main()\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, cwd=tmp_path)
    assert b"[/b]" in found.stderr
    assert not set(found.stderr) & {0x1B, 0x07} and b"\xc2\x9b" not in found.stderr


@pytest.mark.parametrize(
    "arguments", [["draw", "c", "p", "--output\x1b[2J"], ["x\x1b[2J"], ["why", "c", "k", "--plan\x1b"]]
)
def test_mistaken_commands_are_one_safe_line(run_tailwise, arguments):
    found = run_tailwise(*arguments, code=2)
    assert found.stderr.startswith("tailwise: ") and found.stderr.count("\n") == 1
    assert_safe(found.stderr)


def test_ascii_terminals_get_ascii():
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": ""}
    code = "import sys; sys.argv = ['tailwise', 'status', 'caf\\xe9 \\x1b']\n"
    code += "from tailwise.cli import main; main()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
    assert found.returncode == 2 and b"Traceback" not in found.stderr and b"\x1b" not in found.stderr
    assert found.stderr.isascii()


def test_progress_descriptions_are_shown_as_given(monkeypatch):
    from rich.console import Console

    from tailwise import progress

    stream = io.StringIO()
    monkeypatch.setattr(
        "rich.console.Console", lambda **_: Console(file=stream, force_terminal=True, color_system=None)
    )
    assert list(progress.bars([1, 2], "[/b] \x1b[2J")) == [1, 2]
    assert "[/b] \\x1b[2J" in stream.getvalue()


def test_arguments_that_are_not_utf_8_are_refused(tmp_path):
    for words in (
        ["remove", "cat", "--keys", "k.txt", "--reason", b"\xff"],
        ["why", "cat", b"\xff"],
        ["import", "a", b"\xff\x1b"],
    ):
        command = [sys.executable, "-m", "tailwise", *words]
        found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert found.returncode == 2 and "is not UTF-8" in found.stderr and found.stderr.count("\n") == 1
        assert_safe(found.stderr)
