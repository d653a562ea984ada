"""One flipped bit in any file of a catalog: every command gives the same result, or refuses; it never crashes or hangs."""

import pytest

FLIPS = 64  # of each command, in `make soak`
# What a command reads, and what it makes: a catalog with a clustering, drop lists, plans and a removal.
READERS = {
    "status": "status CAT",
    "explain": "explain CAT p",
    "why": "why CAT 000017",
    "draw": "draw CAT p --epoch 3 --output OUT/drawn.parquet",
    "export-keys": "export CAT p OUT/keys.txt --to keys --epoch 3",
    "export-shards": "export CAT p OUT/shards --to shards --epoch 3 --workers 1",
    "plan": "plan CAT other --method dbp --keep 0.3",
    "removed": "removed CAT p --output OUT/never.parquet",
}


@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit_never_changes_a_result(runner, full_catalog, tmp_path, times, note, numbers, kept, name):
    work = tmp_path / "work"
    argv, base = full_catalog(runner, READERS[name], work)
    runner.ask("copy", **{"from": base, "to": work})
    files = sorted(path for path in runner.ask("tree", folders=[work]) if "lock" not in path)
    whole = runner.run(*argv, cwd=work)
    assert whole["code"] == 0, whole
    made = {
        path: value for path, value in kept(runner.ask("tree", folders=[work]), work).items() if path.startswith("/out")
    }
    chosen, refused = numbers(name), 0
    for trial in range(times(FLIPS)):
        runner.ask("copy", **{"from": base, "to": work})
        path = files[int(chosen.integers(len(files)))]
        # Every other flip hits the head of the file, where formats keep their lengths.
        place = {"first": 128} if trial % 2 else {}
        at = runner.ask("flip", path=path, seed=int(chosen.integers(1 << 30)), **place)
        done = runner.run(*argv, cwd=work, timeout=60)
        where = (path, at)
        assert not done["late"] and done["code"] in (0, 1, 2), (where, done)
        assert "Traceback" not in done["err"], (where, done)
        if done["code"]:
            refused += 1
        else:
            after = kept(runner.ask("tree", folders=[work]), work)
            assert {each: value for each, value in after.items() if each.startswith("/out")} == made, where
            assert done["out"] == whole["out"], where
    note("flips", name, trials=times(FLIPS), hits=times(FLIPS), refused=refused)
