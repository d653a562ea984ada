"""Names: parameters in errors of the library are options of the command line; old spellings work; unknown names get the nearest one."""

import ast
import errno
import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import tailwise
from tailwise.catalog.files import map_array
from tailwise.cli import app
from tailwise.cli.app import _ELSEWHERE, as_options
from tailwise.errors import ConflictError, NotFoundError, UserError
from tailwise.pipeline.steps import Step
from tailwise.requests import (
    ClusterRequest,
    DedupRequest,
    EmbedRequest,
    EvaluateRequest,
    ExportRequest,
    GroupRequest,
    ImportRequest,
    PlanRequest,
    TrainRequest,
    refuse_idle,
)
from tailwise.text import OLD_COMMANDS, OLD_OPTIONS, command_line, did_you_mean, option_words

SOURCE = Path(tailwise.__file__).parent
COMMANDS = typer.main.get_command(app).commands


def named_in_errors():
    """All words in backticks in the messages of errors that library files raise."""
    for path in SOURCE.rglob("*.py"):
        if "cli" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                texts = [each.value for each in ast.walk(node.exc) if isinstance(each, ast.Constant)]
                for text in texts:
                    if isinstance(text, str):
                        yield from ((path.name, name) for name in re.findall(r"`(\w+)`", text))


def test_every_parameter_in_an_error_is_an_option():
    options = {item.name for command in COMMANDS.values() for item in command.params}
    unknown = {(path, name) for path, name in named_in_errors() if name not in options | set(_ELSEWHERE)}
    # A row of a comparison, and what is derived from a configuration.
    assert {name for _, name in unknown} <= {"proportional", "snapshot"}, unknown


def test_messages_name_options():
    assert as_options("`min_per_cluster` 3, `minimum` 2, `k` 5: see `no_such`") == (
        "--min-per-cluster 3, --min 2, --k 5: see `no_such`"
    )
    assert as_options("`output`", "export") == "--output"


@pytest.mark.parametrize(("command", "old"), [(name, old) for name, pairs in OLD_OPTIONS.items() for old in pairs])
def test_old_options_stand_for_new_ones(command, old):
    new = OLD_OPTIONS[command][old]
    names = {option for item in COMMANDS[command].params for option in item.opts}
    assert f"--{new}" in names
    assert f"--{old}" not in names
    if command != "explain":
        assert Step(command, {old: 5}).options == {new: 5}


def test_old_commands_stand_for_new_ones():
    for old, new in OLD_COMMANDS.items():
        assert new in COMMANDS
        assert old not in COMMANDS
        assert Step(old, {}).command == new
        assert CliRunner().invoke(app, [old, "--help"]).output == CliRunner().invoke(app, [new, "--help"]).output


def test_an_error_shows_the_option_as_it_was_typed(small_catalog):
    catalog = str(small_catalog.folder)
    for option, value in (("--clusters", "3"), ("--k", "3")):
        assert CliRunner().invoke(app, ["cluster", catalog, option, value]).exit_code == 0
    for option in ("--clusters", "--k"):
        found = CliRunner().invoke(app, ["cluster", catalog, option, "4"]).exception
        assert isinstance(found, ConflictError)
        assert f"with other settings ({option} 3 → 4)" in str(found)


def test_a_dedup_with_other_settings_names_its_options(small_catalog):
    tailwise.cluster(small_catalog, ClusterRequest(k=3))
    tailwise.cluster(small_catalog, ClusterRequest(k=4, name="fine"))
    tailwise.dedup(small_catalog, DedupRequest(epsilon=0.1))
    words = ["dedup", str(small_catalog.folder), "--epsilon", "0.1", "--clustering", "fine", "--order", "nearest"]
    told = str(CliRunner().invoke(app, words).exception)
    assert "(--clustering main → fine, --order farthest → nearest)" in told


def test_unknown_names_get_the_nearest_one(small_catalog):
    assert did_you_mean("dynamis", ["dbp", "dynamics"]) == "did you mean 'dynamics'?"
    assert did_you_mean("x", ["dbp", "dynamics"]) == "use dbp, dynamics"
    tailwise.cluster(small_catalog, ClusterRequest(k=3, name="fine"))
    with pytest.raises(NotFoundError, match=r"no clustering named 'fien' \(there: fine\): did you mean 'fine'"):
        tailwise.make_plan(small_catalog, "p", PlanRequest("dynamics", keep=0.5, clustering="fien"))


def test_command_lines_are_quoted():
    assert option_words({"a_b": {"scale": [0.4, 1]}, "c": True, "d": None, "e": False, "f": [1, 2]}) == [
        *("--a-b", "scale=(0.4, 1)", "--c", "--f", "1", "2")
    ]
    assert command_line("cluster", Path("my pool"), k="…", name="x") == "`tailwise cluster 'my pool' --k … --name x`"


@pytest.mark.parametrize("option", ["--option", "--final-option"])
def test_pairs_that_are_none_are_named_by_their_option(small_catalog, option):
    words = ["plan", str(small_catalog.folder), "p", "--method", "random", "--keep", "0.5", option]
    assert f"{option} 'x': give NAME=VALUE" in str(CliRunner().invoke(app, [*words, "x"]).exception)
    assert f"{option} x is given twice" in str(CliRunner().invoke(app, [*words, "x=1", option, "x=2"]).exception)


def test_fields_that_do_nothing_are_refused():
    refuse_idle(PlanRequest("rates", rates=Path("x")), {"method", "rates"}, "here")
    refuse_idle(PlanRequest("random", without=[]), {"method"}, "here")
    with pytest.raises(UserError, match="`alpha` does nothing here"):
        refuse_idle(PlanRequest("random", alpha=0.0), {"method"}, "here")


def test_help_of_plan_comes_from_the_request():
    helped = " ".join(CliRunner().invoke(app, ["plan", "--help"], terminal_width=200).output.split())
    for text in ("Budget, as a share of the pool", "alpha after", "--anneal-epochs", "--option NAME=VALUE"):
        assert text in helped.replace("│ ", "").replace(" │", "") or text in helped


def test_functions_take_the_path_of_a_catalog(small_catalog):
    tailwise.cluster(str(small_catalog.folder), ClusterRequest(k=3))
    made = tailwise.make_plan(small_catalog.folder, "p", PlanRequest("random", keep=0.5))
    assert tailwise.Plan(str(small_catalog.folder), "p").draw(0).sum() == made.draw(0).sum()
    assert {"Catalog", "Loader", "make_plan", "ConflictError"} <= set(dir(tailwise))


def test_too_few_open_files_are_named(small_catalog, monkeypatch):
    def opening(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("tailwise.catalog.files.read_array", opening)
    with pytest.raises(
        UserError, match=r"this process may open [\d,]+ files, and needs more: allow more with `ulimit -n"
    ):
        map_array(small_catalog.embedding_folder("image") / "part-000000.npy")


def test_json_holds_no_infinity(capsys):
    from tailwise.cli.printing import print_json

    print_json({"a": [float("inf"), 1.5, {"b": float("nan")}]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [None, 1.5, {"b": None}]}


@pytest.mark.parametrize(
    ("request_class", "values", "message"),
    [
        (EmbedRequest, {"encoder": "pixels", "batch_size": 0}, "`batch_size` 0: must be at least 1"),
        (ImportRequest, {"workers": 0}, "`workers` 0: must be at least 1"),
        (GroupRequest, {"workers": -1}, "`workers` -1: must be at least 1"),
        (ExportRequest, {"workers": -2}, "`workers` -2: must be at least 1"),
        (ExportRequest, {"shard_samples": 0}, "`shard_samples` 0: must be at least 1"),
        (EvaluateRequest, {"seed": -1}, "`seed` -1: must be at least 0"),
        (TrainRequest, {"lanes": 0}, "`lanes` 0: must be at least 1"),
    ],
)
def test_requests_refuse_numbers_out_of_bounds(request_class, values, message):
    with pytest.raises(UserError, match=message):
        request_class(**values)
