"""A full disk at random points of every command: one line that says so; with room again, the same command gives the same bytes."""

import pytest

DISKS = 12  # that are full before each command has ended, in `make soak`
COMMANDS = (
    *(
        "import",
        "captions",
        "captions-json",
        "embed",
        "cluster-fine",
        "dedup",
        "filter",
        "cluster",
        "group-file",
        "plan-dynamics",
        "draw",
    ),
    *("export-keys", "export-rates", "export-parquet", "export-shards", "remove", "removed"),
)
PAGE = 4096


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_costs_nothing_but_time(disk_runner, stage, tmp_path, times, hits, note, numbers, kept, name):
    runner, work = disk_runner, tmp_path / "work"
    runner.ask("disk", at=work, size=1 << 28)
    argv, base = stage(runner, name, work)
    runner.ask("copy", **{"from": base, "to": work})
    before = runner.ask("used", at=work)
    assert (done := runner.run(*argv, cwd="/"))["code"] == 0, done
    expected = kept(runner.ask("tree", folders=[work]), work)
    grown = max(runner.ask("used", at=work) - before, 4 * PAGE)
    chosen = numbers(name)

    def trial():
        nonlocal grown
        runner.ask("disk", at=work, size=1 << 28)
        runner.ask("copy", **{"from": base, "to": work})
        room = int(chosen.integers(0, grown // PAGE)) * PAGE
        runner.ask("disk", at=work, size=runner.ask("used", at=work) + room)
        first = runner.run(*argv, cwd="/")
        if not first["code"]:
            grown = max(room, PAGE)  # what needed more is a cache: without it, the command ends well
        else:
            assert first["code"] in (1, 2), (room, first)
            assert "Traceback" not in first["err"], (room, first)
            assert "no space left on the disk: make room" in first["err"], (room, first)
            assert str(work) in first["err"], (room, first)
        runner.ask("disk", at=work, size=1 << 28)
        again = runner.run(*argv, cwd="/")
        assert again["code"] == 0, (room, again)
        assert kept(runner.ask("tree", folders=[work]), work) == expected, room
        return first["code"] != 0

    note("disks", name, trials=hits(DISKS, trial), hits=times(DISKS))
    runner.ask("unmount", at=work)
