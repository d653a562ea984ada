"""SIGKILL at random points of every command: the same command again gives the same bytes as an uninterrupted one."""

import pytest

KILLS = 14  # that hit each command while it runs, in `make soak`
COMMANDS = (
    *(
        "import",
        "import-workers",
        "captions",
        "captions-json",
        "embed",
        "cluster-fine",
        "dedup",
        "filter",
        "cluster",
        "group-entries",
        "group-file",
    ),
    *("plan-dynamics", "plan-dbp", "plan-rates", "plan-entries", "explain", "draw"),
    *("export-keys", "export-rates", "export-parquet", "export-datacomp", "export-shards"),
    *("train", "evaluate", "compare", "run", "status", "why", "remove", "removed", "verify", "relocate"),
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_resumes_to_the_same_bytes(runner, stage, tmp_path, times, hits, note, numbers, kept, name):
    work = tmp_path / "work"
    argv, base = stage(runner, name, work)
    runner.ask("copy", **{"from": base, "to": work})
    whole = runner.run(*argv, cwd=work, kill_at=0)
    assert whole["code"] == 0, whole
    expected = kept(runner.ask("tree", folders=[work]), work)
    chosen, seconds = numbers(name), whole["seconds"]

    def trial():
        nonlocal seconds
        runner.ask("copy", **{"from": base, "to": work})
        if whole["events"] and chosen.integers(2):
            how = {"kill_at": int(chosen.integers(1, whole["events"] + 1))}
        else:
            how = {"kill_after": float(chosen.uniform(0, seconds))}
        first = runner.run(*argv, cwd=work, **how)
        assert first["hit"] or first["code"] in {0, -9}, (how, first)  # a kill before the command had begun is no hit
        if not first["hit"]:
            if first["code"] == 0:
                seconds = min(seconds, first["seconds"])  # later commands find more in memory than the first one
            return False
        again = runner.run(*argv, cwd=work)
        assert "Traceback" not in again["err"], (how, again)
        assert again["code"] == 0, (how, again)
        assert kept(runner.ask("tree", folders=[work]), work) == expected, how
        return True

    note("kills", name, trials=hits(KILLS, trial), hits=times(KILLS))
