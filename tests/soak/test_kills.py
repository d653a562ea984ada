"""SIGKILL at random points of every command: the same command again gives the same bytes as an uninterrupted one."""

import pytest

KILLS = 26  # of each command, in `make soak`
COMMANDS = (
    *(
        "import",
        "embed",
        "cluster-fine",
        "dedup",
        "filter",
        "cluster",
        "group-entries",
        "group-file",
        "plan-dynamics",
        "plan-dbp",
        "draw",
    ),
    *("export-keys", "export-rates", "export-parquet", "export-shards", "remove", "removed", "relocate"),
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_resumes_to_the_same_bytes(runner, stage, tmp_path, times, note, numbers, kept, name):
    work = tmp_path / "work"
    argv, base = stage(runner, name, work)
    runner.ask("copy", **{"from": base, "to": work})
    whole = runner.run(*argv, cwd=work, kill_at=0)
    assert whole["code"] == 0, whole
    expected = kept(runner.ask("tree", folders=[work]), work)
    chosen, killed = numbers(name), 0
    for trial in range(times(KILLS)):
        runner.ask("copy", **{"from": base, "to": work})
        if trial % 2:
            how = {"kill_at": int(chosen.integers(1, whole["events"] + 1))}
        else:
            how = {"kill_after": float(chosen.uniform(0, whole["seconds"]))}
        first = runner.run(*argv, cwd=work, **how)
        killed += first["code"] == -9
        assert first["code"] in (0, -9), (how, first)
        again = runner.run(*argv, cwd=work)
        assert "Traceback" not in again["err"], (how, again)
        # A command that was killed after it had published may say that its output exists: then that is complete.
        assert again["code"] == 0 or (again["code"] == 2 and "exist" in again["err"]), (how, again)
        assert kept(runner.ask("tree", folders=[work]), work) == expected, how
    note("kills", name, trials=times(KILLS), killed=killed)
    assert killed or times(KILLS) < 5
