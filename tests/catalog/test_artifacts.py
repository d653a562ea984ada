"""Artifacts: made once, resumed with the same settings, never overwritten by others."""

import multiprocessing
import os
import signal
import sys
from contextlib import ExitStack, nullcontext

import pytest

from tailwise.catalog import artifacts
from tailwise.catalog.artifacts import REMOVALS, Artifact, artifact_id, read_manifest
from tailwise.catalog.files import file_digest, read_json, write_json
from tailwise.catalog.kinds import Kind
from tailwise.errors import ConflictError, UserError

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link")
CONFIG = {"k": 500, "merge": None}
INPUTS = {"embeddings": "abc"}


@pytest.fixture
def begin(tmp_path):
    """`begin(name="main", config=CONFIG, inputs=INPUTS)` → an artifact in a folder of its own, begun and let go of."""

    def enter(name="main", config=CONFIG, inputs=INPUTS):
        with Artifact(tmp_path / name, "clusters", config, inputs) as artifact:
            return artifact

    return enter


def make(artifact, files=("a", "b")):
    for name in files:
        artifact.path(name).write_text(name)
    artifact.finish({"rows": 7})
    return artifact


def test_resume_with_the_same_settings_keeps_the_files(begin):
    begin().path("half").write_text("work")
    again = begin()
    assert not again.done
    assert again.path("half").read_text() == "work"


@pytest.mark.parametrize(
    "change",
    [{"config": {**CONFIG, "k": 400}}, {"config": {"k": 500}}, {"inputs": {"embeddings": "abd"}}],
)
def test_other_settings_do_not_touch_unfinished_work(begin, change):
    begin().path("half").write_text("work")
    with pytest.raises(UserError, match="exists unfinished, with other settings") as caught:
        begin(**change)
    place = begin().place
    assert f"`tailwise delete {place.parents[1]} {place.parent.name}/{place.name}`" in str(caught.value)
    assert begin().path("half").read_text() == "work"


def test_after_a_removal_finished_artifacts_stay_and_unfinished_ones_restart(begin):
    after = {**INPUTS, REMOVALS: "x"}
    before = begin()
    before.path("half").write_text("work")
    assert not begin(inputs=after).path("half").exists()
    assert not before.folder.exists()
    made = make(begin("done"))
    assert begin("done", inputs=after).identity != made.identity
    assert read_json(made.path("manifest.json"))["identity"] == made.identity
    with pytest.raises(UserError, match="exists with other settings"):
        begin("done", config={"k": 7}, inputs=after)


def test_what_is_refused_at_once_leaves_nothing(tmp_path):
    def refuse():
        raise UserError("no")

    with pytest.raises(UserError, match="no"), Artifact(tmp_path / "main", "clusters", CONFIG, INPUTS):
        refuse()
    assert [path.name for path in tmp_path.iterdir()] == [".main.lock"]
    with pytest.raises(UserError, match="no"), Artifact(tmp_path / "main", "clusters", CONFIG, INPUTS) as artifact:
        artifact.path("half").write_text("work")
        refuse()
    assert artifact.path("half").exists()
    assert not (tmp_path / "main").exists()  # it gets its name when it is finished


def test_other_settings_take_over_where_no_work_was_done(begin, tmp_path):
    begin().path("half.writing").write_text("torn")
    assert make(begin(config={"k": 400})).done
    assert {path.name for path in tmp_path.iterdir()} == {"main", ".main.lock"}


def test_one_process_at_a_time(begin, tmp_path):
    with Artifact(tmp_path / "main", "clusters", CONFIG, INPUTS) as artifact:
        with pytest.raises(ConflictError, match=r"another process is writing .*main: wait"):
            begin()
        make(artifact)
        assert begin().done  # what is finished may be opened by all


def write_with_others(folder, number, config, locks, turn, step, told):
    """Make one artifact in one of two processes; tell which number has finished it, or why not."""
    if not locks:  # as on two machines with a file system that knows no locks
        artifacts.locked = lambda *_: nullcontext()
    try:
        with ExitStack() as held:
            with turn:
                artifact = held.enter_context(Artifact(folder, "clusters", config, INPUTS))
            step.wait(60)
            artifact.path(f"by-{number}").write_text("x")
            step.wait(60)
            artifact.finish({"writer": number})
        told.put(number)
    except ConflictError as error:
        if locks:
            step.wait(60)
            step.wait(60)
        told.put(str(error))


@pytest.mark.parametrize("configs", [(CONFIG, CONFIG), (CONFIG, {"k": 7})], ids=["same", "other"])
@pytest.mark.parametrize(("locks", "refusal"), [(True, "is writing"), (False, "has finished")])
def test_of_two_writers_one_wins(tmp_path, configs, locks, refusal):
    context, folder = multiprocessing.get_context("fork"), tmp_path / "main"
    turn, step, told = context.Lock(), context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=write_with_others, args=(folder, number, config, locks, turn, step, told))
        for number, config in enumerate(configs)
    ]
    for process in processes:
        process.start()
    winner, reason = sorted((told.get(timeout=100) for _ in processes), key=lambda each: isinstance(each, str))
    for process in processes:
        process.join(100)
    assert f"another process {refusal}" in reason
    manifest = read_manifest(folder, "clustering", "make it")
    assert manifest["summary"] == {"writer": winner}
    assert manifest["identity"]["config"] == configs[winner]
    assert manifest["files"] == {path.name: file_digest(path) for path in folder.glob("by-*")}
    with Artifact(folder, "clusters", configs[winner], INPUTS) as again:
        assert again.done
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *manifest["files"]}
    assert {path.name for path in tmp_path.iterdir()} == {"main", *([".main.lock"] if locks else [])}


def make_until(folder, config, change):
    """Make an artifact of two files; kill the process before its n-th change of the names in the folder. Its exit code: 3 if refused."""
    left = change

    def count(event, arguments):
        nonlocal left
        if event in CHANGES and str(folder.parent) in str(arguments):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        with Artifact(folder, "clusters", config, INPUTS) as artifact:
            if not artifact.done:
                for name in "ab":
                    write_json(artifact.path(name), config)
                artifact.finish({"rows": 7})
    except ConflictError:
        os._exit(3)


def test_killed_at_any_moment_and_repeated_is_done(tmp_path, tree_bytes):
    """Whatever was there when the process was killed, by itself and with a leftover of other settings."""

    def run(config, change=0):
        process = multiprocessing.get_context("fork").Process(target=make_until, args=(folder, config, change))
        process.start()
        process.join(100)
        return process.exitcode

    folder = tmp_path / "whole" / "main"
    assert run(CONFIG) == 0
    whole, change, codes, refused = tree_bytes(folder.parent), 0, [], 0
    while not codes or codes[-1]:
        change += 1
        folder = tmp_path / str(change) / "main"
        codes.append(run(CONFIG, change))
        published = folder.exists()
        other = run({"k": 7})
        assert other in (0, 3)
        if other:
            refused += 1
            assert run(CONFIG) == 0
            assert tree_bytes(folder.parent) == whole
        else:
            assert not published
            assert run(CONFIG) == 3
        assert {path.name for path in folder.parent.iterdir()} == {"main", ".main.lock"}
    assert codes == [*[-signal.SIGKILL] * (change - 1), 0]
    assert 5 < refused < change


def test_files_without_a_record_of_their_settings_are_not_trusted(begin, tmp_path):
    unfinished = begin()
    unfinished.path("half").write_text("made by who knows what")
    unfinished.path("pending.json").unlink()
    assert not begin().path("half").exists()
    make(begin()).path("half").write_text("more")
    (tmp_path / "main" / "manifest.json").unlink()
    assert not begin().done
    assert not make(begin()).path("half").exists()


def test_finish_lists_hashes_and_leaves_no_pending(begin):
    artifact = make(begin())
    manifest = read_json(artifact.path("manifest.json"))
    assert manifest["files"] == {name: file_digest(artifact.path(name)) for name in ("a", "b")}
    assert manifest["identity"] == {"kind": "clusters", "format": 1, "config": CONFIG, "inputs": INPUTS}
    assert {"python", "tailwise", "numpy", "torch", "numba", "pyarrow"} <= manifest["made_by"].keys()
    assert manifest["summary"] == {"rows": 7}
    assert {path.name for path in artifact.folder.iterdir()} == {"a", "b", "manifest.json"}


def test_finished_with_the_same_settings_is_done_and_untouched(begin, tree_bytes):
    artifact = make(begin())
    before = tree_bytes(artifact.folder)
    assert begin().done
    assert tree_bytes(artifact.folder) == before


@pytest.mark.parametrize(
    ("change", "saying"),
    [
        ({"config": {**CONFIG, "k": 400}}, "`k` 500 → 400"),
        ({"config": {**CONFIG, "merge": 0.7}}, "`merge` not given → 0.7"),
        ({"config": {**CONFIG, "seed": 3}}, "`seed` not given → 3"),
        ({"inputs": {"embeddings": "xyz"}}, "embeddings changed since"),
    ],
)
def test_finished_with_other_settings_is_refused_and_untouched(begin, tree_bytes, change, saying):
    artifact = make(begin())
    before = tree_bytes(artifact.folder)
    with pytest.raises(UserError, match=saying) as caught:
        begin(**change)
    assert "\n" not in str(caught.value)
    assert tree_bytes(artifact.folder) == before


def test_manifest_is_written_last(begin, monkeypatch):
    artifact = begin()
    artifact.path("a").write_text("a")
    monkeypatch.setattr("tailwise.catalog.artifacts.known_digest", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        artifact.finish({})
    assert not artifact.done
    assert not begin().done
    assert begin().path("a").exists()


def test_read_manifest_names_what_is_there(begin, tmp_path):
    make(begin("one"))
    make(begin("two"))
    begin("unfinished").path("x").touch()
    assert read_manifest(tmp_path / "one", "clustering", "make it")["summary"] == {"rows": 7}
    assert Kind("section", ".", ()).finished(tmp_path) == ["one", "two"]
    with pytest.raises(UserError, match=r"no clustering named 'unfinished' \(there: one, two\): run tailwise cluster"):
        read_manifest(tmp_path / "unfinished", "clustering", "run tailwise cluster")
    with pytest.raises(UserError, match="there: none"):
        read_manifest(tmp_path / "nowhere" / "x", "clustering", "run tailwise cluster")


def test_artifact_id_tells_content_and_settings_apart(begin, tmp_path):
    def made(name, config=CONFIG, files=("a",)):
        return artifact_id(read_json(make(begin(name, config), files).path("manifest.json")))

    first = made("one")
    assert first == made("two")  # the name plays no role
    assert first != made("three", {**CONFIG, "clusters": 3})
    assert first != made("four", files=("b",))


def test_a_damaged_manifest_is_named(begin):
    artifact = make(begin())
    artifact.path("manifest.json").write_text('{"identity": ')
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        begin()


def test_a_refusal_lets_go_of_the_lock(begin):
    begin().path("half").write_text("work")
    with pytest.raises(UserError, match="with other settings") as kept:
        begin(config={"k": 400})
    assert kept.value is not None  # the exception, and with it the refused artifact, is alive
    assert begin().path("half").exists()
