"""New shards: each drawn copy once, its bytes untouched, in one shuffle; the same bytes whatever happens on the way."""

import io
import itertools
import json
import tarfile
from collections import Counter

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.errors import UserError
from tailwise.export import export, shard_writer, shards, shuffled
from tailwise.export.shard_writer import MAX_MEMBER_BYTES, member_ranges, read_members, ustar_header
from tailwise.export.shards import _groups, write_shards
from tailwise.export.shuffled import read_positions
from tailwise.requests import ClusterRequest, ExportRequest, PlanRequest
from tailwise.shards.ranges import LocalShards
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.remove import remove

FEW = ExportRequest(50, workers=1)


def shards_in(folder):
    return sorted(path.name for path in folder.glob("*.tar"))


def test_each_copy_comes_once_with_its_bytes_untouched(thrice, tmp_path, read_tars, sources_of):
    result = write_shards(thrice, 0, tmp_path / "out", FEW)
    assert (result.samples, result.shards, result.rejected) == (280, 6, {})
    sources = {(row["shard"], row["key"]): row for row in sources_of(thrice.catalog)}
    samples = read_tars(tmp_path / "out")
    assert len(samples) == len({key for _, key in samples}) == 280
    seen = Counter()
    for (tar, key), members in samples.items():
        described = json.loads(members.pop("json"))
        source = sources[described["source_shard"], described["source_key"]]
        seen[source["shard"], source["key"], described["copy"]] += 1
        theirs = dict(source["members"])
        said = theirs.pop("json", b"")
        assert members == theirs
        assert described == {
            **(json.loads(said) if said.startswith(b"{") and said != b"{broken" else {}),
            "key": key,
            "uid": source["uid"],
            "source_shard": source["shard"],
            "source_key": source["key"],
            "copy": described["copy"],
        }
        assert key[:8] == tar[:8] and 0 <= int(key[8:]) < 47 and len(key) == 12
    copies = thrice.draw(0).tolist()
    assert seen == Counter(
        {
            (row["shard"], row["key"], copy): 1
            for row, n in zip(sources.values(), copies, strict=True)
            for copy in range(n)
        }
    )


def test_what_stands_beside_the_tars(thrice, tmp_path, read_tars, sources_of):
    write_shards(thrice, 0, tmp_path / "out", FEW)
    sources = {row["uid"]: row for row in sources_of(thrice.catalog)}
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text())
    assert list(sizes) == [f"{number:08d}.tar" for number in range(6)] == shards_in(tmp_path / "out")
    assert sorted(sizes.values()) == [46, 46, 47, 47, 47, 47]
    samples = read_tars(tmp_path / "out")
    for tar, size in sizes.items():
        stats = json.loads((tmp_path / "out" / tar.replace(".tar", "_stats.json")).read_text())
        assert (stats["count"], stats["successes"], stats["status_dict"]) == (size, size, {"success": size})
        rows = pq.read_table((tmp_path / "out" / tar).with_suffix(".parquet")).to_pylist()
        mine = {key: members for (name, key), members in samples.items() if name == tar}
        assert [row["key"] for row in rows] == list(mine)
        for row, members in zip(rows, mine.values(), strict=True):
            source, described = sources[row["uid"]], json.loads(members["json"])
            assert row["caption"] == members["txt"].decode() == source["caption"]
            assert all(row[name] == described[name] for name in ("uid", "source_shard", "source_key", "copy"))
            assert all(row[name] == source[name] for name in ("width", "height"))
            assert row["score"] == source.get("score")
            assert (row["status"], row["error_message"]) == ("success", None)
    lines = (tmp_path / "out" / "source_shards.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == thrice.catalog.shards().select(["shard", "path"]).to_pylist()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"rejected.jsonl", ".scratch"} and not any("writing" in name for name in names)


def test_tars_are_what_the_standard_library_writes(thrice, tmp_path):
    write_shards(thrice, 0, tmp_path / "out", FEW)
    path = tmp_path / "out" / "00000003.tar"
    copy = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=copy, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for member in old:
            info = tarfile.TarInfo(member.name)
            info.size = member.size
            new.addfile(info, old.extractfile(member))
    assert path.read_bytes() == copy.getvalue()


@given(st.from_regex(r"[0-9a-z.]{1,100}", fullmatch=True), st.integers(0, MAX_MEMBER_BYTES))
def test_headers_are_what_the_standard_library_writes(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert ustar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_bytes_depend_on_neither_workers_nor_chunks(thrice, tmp_path, tree_bytes, monkeypatch):
    write_shards(thrice, 0, tmp_path / "one", FEW)
    write_shards(thrice, 0, tmp_path / "three", ExportRequest(50, workers=3))
    monkeypatch.setattr(shuffled, "RUN_COPIES", 7)
    monkeypatch.setattr(shard_writer, "READ_BYTES", 700)
    write_shards(thrice, 0, tmp_path / "chunks", FEW)
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "three") == tree_bytes(tmp_path / "chunks")


@pytest.mark.parametrize("most", [1, 2, 5])
@given(st.sets(st.integers(0, 20)))
def test_groups_hold_consecutive_shards_in_order(most, numbers):
    groups = list(_groups(sorted(numbers), most))
    assert [*itertools.chain(*groups)] == sorted(numbers)
    assert all(0 < len(group) <= most and group.step == 1 for group in groups)
    assert all(
        len(first) == most or first.stop < second.start for first, second in itertools.pairwise(groups)
    )  # no smaller than they need be


@pytest.mark.parametrize(("copies", "groups"), [(1, 6), (100, 3), (1 << 18, 1)])
def test_runs_are_looked_through_once_for_a_group(thrice, tmp_path, tree_bytes, monkeypatch, copies, groups):
    write_shards(thrice, 0, tmp_path / "plain", FEW)
    looks = []
    monkeypatch.setattr(
        shard_writer, "read_positions", lambda *asked: looks.append(asked[1:]) or read_positions(*asked)
    )
    monkeypatch.setattr(shards, "GROUP_COPIES", copies)
    monkeypatch.setattr(shards, "LEAST_ITEMS", 1)
    write_shards(thrice, 0, tmp_path / "grouped", FEW)
    assert tree_bytes(tmp_path / "plain") == tree_bytes(tmp_path / "grouped")
    assert [start for start, _ in looks[1:]] == [stop for _, stop in looks[:-1]]
    assert len(looks) == groups


def test_the_order_is_shuffled_over_all_and_another_in_each_epoch(small_catalog, tmp_path, read_tars):
    cluster(small_catalog, ClusterRequest(k=12))
    orders = []
    for seed in range(4):
        plan = make_plan(small_catalog, f"p{seed}", PlanRequest("proportional", keep=1.0, seed=seed))
        for epoch in range(2):
            folder = tmp_path / f"{seed} {epoch}"
            write_shards(plan, epoch, folder, ExportRequest(150, workers=1))
            keys = [json.loads(members["json"])["source_key"] for members in read_tars(folder).values()]
            orders.append(np.array(keys, int))
    rows = np.arange(600)
    groups = plan.groups[:]
    chance = (np.bincount(groups) / 600) @ (np.bincount(groups) / 600)
    correlations, together = [], []
    for at, order in enumerate(orders):
        assert sorted(order) == list(rows)
        correlations += [np.corrcoef(rows, order)[0, 1], *(np.corrcoef(order, other)[0, 1] for other in orders[:at])]
        together.append(np.mean(groups[order][1:] == groups[order][:-1]))
        halves = np.stack([np.bincount(order[part] // 100, minlength=6) for part in (slice(300), slice(300, 600))])
        assert halves.min() >= 30  # each hundred of the source, over both halves: 50 ± 4.6
    # A uniform permutation: standard deviation 1/√599 = 0.041 each.
    assert np.abs(correlations).max() < 0.16
    assert 0.02 < np.std(correlations) < 0.06
    assert abs(np.mean(together) - chance) < 0.02


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_members_are_read_as_they_lie(tmp_path_factory, data):
    """Against reading each by itself; the file is cut short, so that some can't be read."""
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    count = data.draw(st.integers(1, 30))
    shards = generator.integers(0, 2, count)
    sizes = generator.choice([-1, 0, 1, 700, 9000], (count, 3))
    sizes[:, 0] = np.maximum(sizes[:, 0], 1)
    starts = np.where(sizes >= 0, generator.choice([0, 5, 1000, 9000, 30_000], (count, 3)), -1)
    contents = [generator.bytes(length) for length in (40_000, data.draw(st.integers(0, 40_000)))]
    folder = tmp_path_factory.mktemp("members")
    paths = [folder / f"{shard}.tar" for shard in range(2)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    ranges, number = member_ranges(shards, starts, sizes)
    found = read_members(LocalShards([str(path) for path in paths]), shards, starts, sizes)
    for sample in range(count):
        there = np.flatnonzero(sizes[sample] >= 0)
        content = contents[shards[sample]]
        spans = [(starts[sample, at], starts[sample, at] + sizes[sample, at]) for at in there]
        for at, (start, stop) in zip(there, spans, strict=True):
            shard, low, high = ranges[number[sample, at]]
            assert shard == shards[sample] and low <= start and stop <= high
        mine = [ranges[number[sample, at]] for at in there]
        if max(high for _, low, high in mine if high > low) > len(content):
            assert isinstance(found[sample], OSError)
        else:
            expected = [None, None, None]
            for at, (start, stop) in zip(there, spans, strict=True):
                expected[at] = content[start:stop]
            assert found[sample] == tuple(expected)


def test_remote_tars_give_the_same_bytes(mixed, tmp_path, tree_bytes, monkeypatch):
    """Through any fsspec file system: here its own in memory, so that one process does all."""
    monkeypatch.setattr(shard_writer, "READ_BYTES", 3000)
    files = fsspec.filesystem("memory")
    for name in ("a", "b"):
        files.put(str(mixed.folder.parent / name), f"/shards-test/{name}", recursive=True)
    try:
        sources = [f"memory://shards-test/{name}/{{00000..00001}}.tar" for name in ("a", "b")]
        there = import_pool(sources, tmp_path / "there", workers=1, part_rows=105).catalog
        assert there.shards()["path"].to_pylist()[0].startswith("memory://")
        request = PlanRequest("random", keep=0.5)
        for catalog, name in ((mixed, "here"), (there, "remote")):
            write_shards(make_plan(catalog, "p", request), 0, tmp_path / name, FEW)
    finally:
        files.rm("/shards-test", recursive=True)
    mine, theirs = tree_bytes(tmp_path / "here"), tree_bytes(tmp_path / "remote")
    assert mine.pop("source_shards.jsonl") != theirs.pop("source_shards.jsonl")
    assert len(mine) == 9 and mine == theirs


# --- interruptions ------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from tailwise import Catalog, Plan
from tailwise.export import export
from tailwise.requests import ExportRequest
if __name__ == "__main__":
    plan = Plan(Catalog.open(sys.argv[1]), "thrice")
    export(plan, "shards", Path(sys.argv[2]), request=ExportRequest(7, workers=int(sys.argv[3])))
    print("finished")
"""


@pytest.fixture
def start(fork_python, thrice, tmp_path):
    """`start(folder, workers)` starts an export of `thrice` in a process of its own → the process and the file of its errors."""

    def start(folder, workers):
        err = tmp_path / f"err-{len(list(tmp_path.glob('err-*')))}"
        return fork_python(SCRIPT, thrice.catalog.folder, folder, workers, out=tmp_path / "out", err=err), err

    return start


@pytest.mark.parametrize(("marker", "workers"), [("00000012.tar", 1), ("00000005_stats.json", 2), (".scratch", 1)])
def test_after_a_kill_the_same_command_goes_on(
    start, thrice, tmp_path, tree_bytes, marker, workers, wait_until, descendants, running
):
    write_shards(thrice, 0, tmp_path / "whole", ExportRequest(7, workers=1))
    folder = tmp_path / "broken"
    process, _ = start(folder, workers)
    wait_until(lambda: (folder / marker).exists() or not process.is_alive())
    writers = descendants(process.pid)
    process.kill()
    process.join()
    wait_until(lambda: not any(map(running, writers)))
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*_stats.json")}
    assert marker == ".scratch" or len(kept) >= 5
    write_shards(thrice, 0, folder, ExportRequest(7, workers=1))
    assert tree_bytes(folder) == tree_bytes(tmp_path / "whole")
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_two_at_once(start, thrice, tmp_path, tree_bytes):
    write_shards(thrice, 0, tmp_path / "whole", ExportRequest(7, workers=1))
    started = [start(tmp_path / "shared", 1) for _ in range(2)]
    for process, _ in started:
        process.join(100)
    assert any(process.exitcode == 0 for process, _ in started)
    for process, err in started:
        assert process.exitcode == 0 or "another process is writing" in err.read_text().splitlines()[-1]
    assert tree_bytes(tmp_path / "shared") == tree_bytes(tmp_path / "whole")


def test_a_finished_shard_that_was_cut_or_lost_is_written_again_and_no_other(thrice, tmp_path, tree_bytes):
    folder = tmp_path / "out"
    write_shards(thrice, 0, folder, FEW)
    before = tree_bytes(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    (folder / "00000001.tar").write_bytes(b"cut")
    (folder / "00000003.parquet").unlink()
    write_shards(thrice, 0, folder, FEW)
    assert tree_bytes(folder) == before
    assert {name for name, then in times.items() if (folder / name).stat().st_mtime_ns != then} == {
        "00000001.tar",
        "00000003.tar",
    }


# --- where it may go ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["plan", "epoch", "shard_samples"])
def test_a_folder_of_another_export_is_refused(thrice, once, tmp_path, tree_bytes, other):
    write_shards(thrice, 0, tmp_path / "out", FEW)
    before = tree_bytes(tmp_path / "out")
    sharding = ExportRequest(49, workers=1) if other == "shard_samples" else FEW
    with pytest.raises(UserError, match=f"an export of something else .*{other}.*name a new folder"):
        write_shards(once if other == "plan" else thrice, int(other == "epoch"), tmp_path / "out", sharding)
    assert tree_bytes(tmp_path / "out") == before


def test_what_is_not_ours_is_not_touched(thrice, tmp_path, tree_bytes):
    catalog = thrice.catalog.folder
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "00000000.tar").write_bytes(b"theirs")
    (tmp_path / "file").write_text("theirs")
    (tmp_path / "alike").mkdir()
    (tmp_path / "alike" / "export.json").write_text('["theirs"]')
    before = tree_bytes(tmp_path)
    for folder, message in (
        (tmp_path / "theirs", "files that are of no export"),
        (tmp_path / "alike", "files that are of no export"),
        (tmp_path / "file", "is a file: name a folder"),
        (tmp_path / "no" / "out", "doesn't exist: make it first"),
        (catalog, "is in the catalog"),
        (catalog / "out", "is in the catalog"),
        (catalog.parent / "a", "files that are of no export"),
    ):
        with pytest.raises(UserError, match=message):
            write_shards(thrice, 0, folder, FEW)
    after = tree_bytes(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[-1] for name in after.keys() - before.keys()} <= {".lock"}
    (tmp_path / "empty").mkdir()
    assert write_shards(thrice, 0, tmp_path / "empty", FEW).samples == 280


def test_options(thrice, tmp_path):
    for options, message in (
        ({"shard_samples": 0}, "`shard_samples` 0: must be at least 1"),
        ({"max_rejected": 1.5}, "`max_rejected` 1.5: must lie in"),
    ):
        with pytest.raises(UserError, match=message):
            ExportRequest(**options)
    with pytest.raises(UserError, match="shards are never overwritten"):
        export(thrice, "shards", tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match="`shard_samples` does nothing in an export to parquet: it is for shards"):
        export(thrice, "parquet", tmp_path / "out", request=FEW)
    assert not (tmp_path / "out").exists()


def test_an_empty_epoch(small_catalog, tmp_path, make_rates_parquet):
    plan = make_rates_parquet(small_catalog, np.full(600, 1e-9))
    with pytest.raises(UserError, match="holds 0 samples"):
        write_shards(plan, 0, tmp_path / "out", FEW)
    assert not (tmp_path / "out").exists()


# --- what can't be read -------------------------------------------------------------------------------------------------


def overwrite_captions(plan, rows):
    """Breaks the captions of rows where they lie, so that the tar keeps its size; returns a function that mends them."""
    samples = [sample for part in plan.catalog.parts() for sample in plan.catalog.samples(part).to_pylist()]
    paths = plan.catalog.shards()["path"].to_pylist()
    old = {}
    for row in rows:
        path, offset = paths[samples[row]["shard"]], samples[row]["caption_offset"]
        with open(path, "r+b") as stream:  # noqa: PTH123
            stream.seek(offset)
            old[path, offset] = stream.read(1)
            stream.seek(offset)
            stream.write(b"\xff")

    def mend():
        for (path, offset), content in old.items():
            with open(path, "r+b") as stream:  # noqa: PTH123
                stream.seek(offset)
                stream.write(content)

    return mend


def test_samples_that_cannot_be_read_are_left_out_and_listed(thrice, tmp_path, read_tars, forget_fingerprints):
    write_shards(thrice, 0, tmp_path / "whole", FEW)
    forget_fingerprints(thrice.catalog)
    overwrite_captions(thrice, [2, 3])  # 2 + 3 copies
    shard = thrice.catalog.shards()["path"].to_pylist()[3]
    with open(shard, "ab") as stream:  # noqa: PTH123
        stream.write(bytes(512))  # 25 samples, 35 copies of them
    with pytest.raises(UserError, match=r"35 of 280 samples lie in 1 shards .*00001\.tar.*bytes; .*`max_rejected`"):
        write_shards(thrice, 0, tmp_path / "out", FEW)
    result = write_shards(thrice, 0, tmp_path / "out", ExportRequest(50, workers=1, max_rejected=0.2))
    assert (result.samples, dict(result.rejected)) == (240, {"unreadable": 35, "caption is not UTF-8": 5})
    whole, lacking = read_tars(tmp_path / "whole"), read_tars(tmp_path / "out")
    assert {name: whole[name] for name in lacking} == lacking
    assert list(lacking) == [name for name in whole if name in lacking]
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    listed = Counter((row["uid"], row["copy"]) for row in rejected)
    gone = [json.loads(whole[name]["json"]) for name in whole if name not in lacking]
    assert listed == Counter((sample["uid"], sample["copy"]) for sample in gone)
    for row in rejected:
        damaged = row["shard"] == shard
        assert row["reason"] == ("unreadable" if damaged else "caption is not UTF-8")
        assert ("when it was imported" if damaged else "0xff") in row["detail"]
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text())
    assert sizes == Counter(tar for tar, _ in lacking)
    for tar, size in sizes.items():
        stats = json.loads((tmp_path / "out" / tar.replace(".tar", "_stats.json")).read_text())
        assert stats["successes"] == size and stats["count"] == sum(name == tar for name, _ in whole)
        table = pq.read_table((tmp_path / "out" / tar).with_suffix(".parquet"))
        assert table["status"].to_pylist().count("success") == size


def test_too_many_that_cannot_be_read_end_it_and_once_mended_the_rerun_is_whole(
    thrice, tmp_path, tree_bytes, forget_fingerprints
):
    write_shards(thrice, 0, tmp_path / "whole", FEW)
    forget_fingerprints(thrice.catalog)
    mend = overwrite_captions(thrice, [2, 3, 7, 8])  # 10 copies
    with pytest.raises(
        UserError, match=r"of 280 samples can't be read so far, .* the first is caption is not UTF-8: .*ff"
    ):
        write_shards(thrice, 0, tmp_path / "out", FEW)
    assert not (tmp_path / "out" / "sizes.json").exists()
    mend()
    write_shards(thrice, 0, tmp_path / "out", FEW)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")


def test_a_replaced_tar_of_the_same_length_is_left_out(thrice, tmp_path):
    """Names, offsets and sizes stay: a caption has moved to another sample."""
    path = thrice.catalog.shards()["path"].to_pylist()[3]
    samples = [sample for part in thrice.catalog.parts() for sample in thrice.catalog.samples(part).to_pylist()]
    of_tar = [sample for sample in samples if sample["shard"] == 3]
    one, other = next(
        (one, other)
        for one, other in itertools.combinations(of_tar, 2)
        if one["caption_bytes"] == other["caption_bytes"] and one["caption"] != other["caption"]
    )
    with open(path, "r+b") as stream:  # noqa: PTH123
        for sample, caption in ((one, other["caption"]), (other, one["caption"])):
            stream.seek(sample["caption_offset"])
            stream.write(caption.encode())
    with pytest.raises(UserError, match=r"35 of 280 samples lie in 1 shards .*00001\.tar: other content"):
        write_shards(thrice, 0, tmp_path / "out", FEW)
    result = write_shards(thrice, 0, tmp_path / "out", ExportRequest(50, workers=1, max_rejected=0.2))
    assert (result.samples, dict(result.rejected)) == (245, {"unreadable": 35})


def test_samples_without_an_image_in_a_tar_are_refused(mixed, tmp_path, make_rates_parquet):
    """DataComp's metadata beside tars: a plan that may draw of it is refused; one that draws of the tars alone isn't."""
    table = {"uid": [f"{row:032x}" for row in range(1000, 1010)], "text": ["…"] * 10, "original_width": [9] * 10}
    (tmp_path / "metadata").mkdir()
    pq.write_table(pa.table(table), tmp_path / "metadata" / "0.parquet")
    import_pool([str(tmp_path / "metadata")], tmp_path / "catalog", workers=1)
    catalog = import_pool([str(mixed.folder.parent / "a")], tmp_path / "catalog", workers=1).catalog
    with pytest.raises(UserError, match=r"file\(s\) of metadata have no images"):
        write_shards(make_plan(catalog, "all", PlanRequest("random", keep=1.0)), 0, tmp_path / "out", FEW)
    assert not (tmp_path / "out").exists()
    plan = make_rates_parquet(catalog, [0.0] * 10 + [1.0] * 105)
    assert write_shards(plan, 0, tmp_path / "out", FEW).samples == 105


def test_removed_samples_come_no_more_and_make_it_another_export(thrice, tmp_path, read_tars, sources_of):
    write_shards(thrice, 0, tmp_path / "before", FEW)
    gone = sources_of(thrice.catalog)[3]  # 3 copies
    (tmp_path / "gone.txt").write_text(gone["uid"])
    remove(thrice.catalog, tmp_path / "gone.txt")
    with pytest.raises(UserError, match="this epoch as it was before samples were removed"):
        write_shards(thrice, 0, tmp_path / "before", FEW)
    assert write_shards(thrice, 0, tmp_path / "after", FEW).samples == 277
    before, after = (
        Counter(json.loads(members["json"])["uid"] for members in read_tars(tmp_path / name).values())
        for name in ("before", "after")
    )
    assert before - after == {gone["uid"]: 3} and not after - before


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command(run_tailwise, thrice, tmp_path, forget_fingerprints):
    command = ["export", thrice.catalog.folder, "thrice", "--to"]
    options = ["shards", str(tmp_path / "out"), "--shard-samples", "50", "--workers", "1", "--epoch", "1", "--json"]
    overwrite_captions(thrice, [2])
    forget_fingerprints(thrice.catalog)
    result = run_tailwise(*command, *options)
    assert json.loads(result.stdout) == {
        "output": str(tmp_path / "out"),
        "entries": 278,
        "rejected": {"caption is not UTF-8": 2},
        "unused_drop_lists": [],
    }
    result = run_tailwise(*command, *options[:-1])
    assert "278 entries" in result.stdout and "left out, caption is not UTF-8: 2" in result.stdout
    result = run_tailwise(*command, "keys", tmp_path / "k", "--max-rejected", "0.5", code=2)
    assert "--max-rejected does nothing in an export to keys: it is for shards" in result.stderr
