"""Shards that change after their import: left out and named, or replaced with `update`; unchanged samples keep uid and embeddings."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise import Loader, export_plan
from tailwise.catalog.captions import Captions
from tailwise.catalog.embeddings import open_column, write_part
from tailwise.catalog.removals import Removals
from tailwise.errors import UserError
from tailwise.plan.plan import Plan
from tailwise.requests import CaptionsRequest, DedupRequest, EmbedRequest, PlanRequest
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.embedding import tasks
from tailwise.steps.embedding.embed import embed
from tailwise.steps.importing import shards as module
from tailwise.steps.importing.captions import join_captions
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.kept import kept_rows
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.excluded import write_excluded
from tailwise.steps.upkeep.remove import remove
from tailwise.steps.upkeep.status import status
from tailwise.steps.upkeep.verify import verify
from tailwise.steps.upkeep.why import why

PART_ROWS = 40
IMAGE_BYTES = 9_000  # some seven samples a block of the fingerprint


@pytest.fixture(scope="session")
def make_members(make_image):
    """`make_members(shard, rows, other=())` → members of some samples of a tar; images and captions of `other` rows are others."""

    def make(shard, rows, other=()):
        members = []
        for row in rows:
            seed = 1000 * shard + row + 500_000 * (row in other)
            noise = np.random.default_rng(seed).bytes(IMAGE_BYTES)
            caption = f"caption {shard} {row}{' new' * (row in other)}"
            members += [
                (f"{shard:02d}{row:03d}.jpg", make_image(seed) + noise),
                (f"{shard:02d}{row:03d}.txt", caption.encode()),
            ]
        return members

    return make


@pytest.fixture
def pool(tmp_path, make_tar, make_members):
    """`pool(shard, rows, other=(), **options)` writes a tar of tmp_path / "pool"; three tars of 30 samples are there."""

    def write(shard, rows, other=(), **options):
        return make_tar(tmp_path / "pool" / f"{shard:02d}.tar", make_members(shard, rows, other), **options)

    for shard in range(3):
        write(shard, range(30))
    write.folder = tmp_path / "pool"
    return write


def table(catalog, *names):
    return pa.concat_tables([catalog.samples(part, ["key", *names]) for part in catalog.parts()])


def vectors(catalog, column="image"):
    return np.concatenate(catalog.embedding_parts(column, catalog.snapshot()))


def live(catalog):
    """Key → row of all samples whose file was not replaced."""
    removed = set(Removals.of(catalog).rows.tolist())
    keys = table(catalog)["key"].to_pylist()
    rows = [row for row in range(len(keys)) if row not in removed]
    assert len({keys[row] for row in rows}) == len(rows)
    return {keys[row]: row for row in rows}


def read_all(catalog, plan, **options):
    """The rows of one epoch, and what was replaced, each image compared with the sample's own."""
    loader = Loader(plan, batch_size=10, **options)
    rows, replaced = [], []
    for batch in itertools.islice(iter(loader), 6):
        rows += batch.rows.tolist()
        replaced += batch.replaced
    return rows, replaced


def test_a_changed_tar_is_left_out_and_named_and_the_others_are_imported(run, pool, run_tailwise, tmp_path):
    catalog = run(pool.folder).catalog
    pool(1, range(35))
    pool(3, range(10))
    report = run(pool.folder)
    assert (report.new_shards, report.new_samples) == (1, 10)
    assert report.changed == [str(pool.folder / "01.tar")]
    assert not catalog.replaced() and len(live(catalog)) == 100
    found = run_tailwise("import", pool.folder, catalog.folder, code=1)
    assert "nothing new" in found.stdout and "1 shards changed" in found.stderr and "--update" in found.stderr
    run_tailwise("import", pool.folder, catalog.folder, "--update")
    assert "nothing new" in run_tailwise("import", pool.folder, catalog.folder).stdout


def test_only_the_changed_tar_is_new(run, pool, tree_bytes):
    catalog = run(pool.folder).catalog
    before, first, uids = (
        tree_bytes(catalog.folder),
        catalog.snapshot(),
        dict(zip(*table(catalog, "uid").to_pydict().values(), strict=True)),
    )
    pool(1, range(5, 40), other=(7, 8))
    report = run(pool.folder, update=True)
    assert (report.new_shards, report.new_samples, report.changed) == (1, 35, [])
    assert catalog.snapshot(1) == first and catalog.replaced() == {1: 3}
    after = tree_bytes(catalog.folder)
    assert {name for name in before if after[name] != before[name]} == {"shards.parquet", "snapshots/head.json"}
    rows = live(catalog)
    assert sorted(rows) == sorted(
        [f"{shard:02d}{row:03d}" for shard in (0, 2) for row in range(30)] + [f"01{row:03d}" for row in range(5, 40)]
    )
    now = table(catalog, "uid", "caption").to_pydict()
    assert all(now["uid"][row] == uids[key] for key, row in rows.items() if key in uids)
    assert now["caption"][rows["01007"]] == "caption 1 7 new" and now["caption"][rows["01009"]] == "caption 1 9"
    assert catalog.shards()["path"].to_pylist()[1] == f"{pool.folder / '01.tar'} (replaced by shard 3)"
    assert [item["samples"] for item in status(catalog)["removed"]] == [30]
    assert verify(catalog)[1] == []
    assert run(pool.folder, update=True).new_shards == 0  # done


def test_a_change_behind_the_first_block_is_found_by_an_update(run, pool):
    catalog = run(pool.folder).catalog
    path = pool.folder / "01.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run(pool.folder).changed == []  # the loader and `embed` refuse it
    assert run(pool.folder, update=True).new_samples == 30 and catalog.replaced() == {1: 3}


@pytest.mark.parametrize("update", [True, False])
def test_a_tar_without_good_samples_replaces_nothing(run, pool, update):
    catalog = run(pool.folder).catalog
    (pool.folder / "01.tar").write_bytes(b"<html>not found</html>" * 40)
    pool(3, range(4))
    report = run(pool.folder, update=update)
    assert report.changed == [str(pool.folder / "01.tar")] and report.new_samples == 4
    assert not catalog.replaced() and len(live(catalog)) == 94
    pool(1, range(12))
    assert run(pool.folder, update=True).changed == [] and catalog.replaced() == {1: 4}


def test_replaced_twice_and_back_again(run, pool):
    catalog, content = run(pool.folder).catalog, (pool.folder / "01.tar").read_bytes()
    uids = dict(zip(*table(catalog, "uid").to_pydict().values(), strict=True))
    pool(1, range(20))
    run(pool.folder, update=True)
    pool(1, range(45))
    run(pool.folder, update=True)
    (pool.folder / "01.tar").write_bytes(content)
    run(pool.folder, update=True)
    assert catalog.replaced() == {1: 3, 3: 4, 4: 5} and catalog.first_states().tolist() == [0, 1, 2, 1, 1, 1]
    now, rows = table(catalog, "uid")["uid"].to_pylist(), live(catalog)
    assert {key: now[row] for key, row in rows.items()} == uids
    moved = pool.folder.with_name("moved")
    shutil.move(pool.folder, moved)
    checked = []
    assert catalog.relocate(str(pool.folder), str(moved), checked.append) == 6
    assert [Path(path).name for path in checked[0]["path"].to_pylist()] == ["00.tar", "02.tar", "01.tar"]
    assert run(moved).new_shards == 0
    assert len(set(catalog.shards()["path"].to_pylist())) == 6


def test_embed_keeps_what_is_proven_and_reads_only_the_rest(run, pool, watched):
    """An extended tar keeps nearly all images; captions are kept wherever their text is the same."""
    catalog = run(pool.folder).catalog
    request = EmbedRequest(encoder="pixels", workers=1)
    embed(catalog, request)
    before = vectors(catalog)
    pool(1, range(40), other=(25,))
    run(pool.folder, update=True)
    with pytest.raises(UserError, match="40 of 130 samples have no image embeddings"):
        vectors(catalog)
    with watched(tasks.Finished, "write") as calls:
        report = embed(catalog, request)
    embedded = sum(call[1].rows for call in calls)
    after, rows = vectors(catalog), live(catalog)
    assert report.embedded == 40
    assert 15 <= embedded <= 29  # up to the last block before the image that changed
    for key, row in rows.items():
        if key in {f"{shard:02d}{at:03d}" for shard in range(3) for at in range(30)} - {"01025"}:
            old = 30 * int(key[:2]) + int(key[2:])
            np.testing.assert_array_equal(after[row], before[old])
    assert (after[rows["01025"]] != before[55]).any()
    # All is as if it were embedded at once.
    other = import_pool(pool.folder, catalog.folder.with_name("whole"), workers=1).catalog
    embed(other, request)
    whole = vectors(other)
    for row, key in enumerate(table(other)["key"].to_pylist()):
        np.testing.assert_array_equal(after[rows[key]], whole[row])


def test_embed_never_reads_a_replaced_tar(run, pool):
    catalog = run(pool.folder).catalog
    pool(1, range(10))
    run(pool.folder, update=True)
    report = embed(catalog, EmbedRequest(encoder="pixels", workers=1))
    assert report.embedded == 70 and report.lacking == 70
    assert not vectors(catalog)[30:60].any()
    dedup(catalog, DedupRequest(exact="pixels", name="same"))


def test_imported_embeddings_are_kept_as_far_as_images_are(run, pool, make_vectors, make_embeddings, tmp_path):
    keys = [f"{shard:02d}{row:03d}" for shard in range(3) for row in range(30)]
    found = make_vectors([*keys, *(f"01{row:03d}" for row in range(30, 50))])
    make_embeddings(tmp_path / "embeddings", {key: found[key] for key in keys}, 1)
    catalog = run(pool.folder, tmp_path / "embeddings").catalog
    before = vectors(catalog)
    pool(1, range(50))
    report = run(pool.folder, update=True)
    assert any("of 50 samples of replaced shards keep theirs" in note for note in report.notes)
    after, rows = vectors(catalog), live(catalog)
    kept = [row for row in range(30) if after[rows[f"01{row:03d}"]].any()]
    assert kept == list(range(len(kept))) and 22 <= len(kept) < 30
    for row in kept:
        np.testing.assert_array_equal(after[rows[f"01{row:03d}"]], before[30 + row])
    make_embeddings(tmp_path / "more", {key: found[key] for key in found if key.startswith("01")}, 1)
    run(pool.folder / "01.tar", tmp_path / "more")
    full = vectors(catalog)
    for key, row in rows.items():
        np.testing.assert_allclose(full[row], found[key] / np.linalg.norm(found[key]), atol=2e-3)


@settings(max_examples=40)
@given(st.data())
def test_no_sample_keeps_the_embedding_of_another_image(make_tar_bytes, make_members, tmp_path_factory, data):
    """Whatever becomes of a tar: kept embeddings are those of the same key, and the same image or the same caption."""
    draw, folder = data.draw, tmp_path_factory.mktemp("any")
    order = st.lists(st.integers(0, 24), unique=True, min_size=1, max_size=20)
    before, after = draw(order), draw(order)
    if extended := draw(st.booleans()):
        after = before + [row for row in after if row not in before]
    other = set(draw(st.lists(st.sampled_from(after), max_size=2)))
    members = make_members(0, before), make_members(0, after, other)
    states = [make_tar_bytes(some) for some in members]
    if cut := draw(st.booleans()):
        state = draw(st.integers(0, 1))
        states[state] = states[state][: draw(st.integers(12_000, len(states[state])))]
    (folder / "0.tar").write_bytes(states[0])
    catalog = import_pool(folder / "0.tar", folder / "c", workers=1, max_rejected=1.0).catalog
    for column in ("image", "text"):
        open_column(catalog, column, 2, "x")
        for part in catalog.parts():
            write_part(catalog, column, part, 2, [np.ones((part.rows, 2), np.float16)])
    (folder / "0.tar").write_bytes(states[1])
    report = import_pool(folder / "0.tar", folder / "c", workers=1, max_rejected=1.0, update=True)
    if not catalog.replaced():  # the fingerprints cover such tars whole
        assert states[0] == states[1] and not report.changed
        return
    keys, (old, new) = table(catalog)["key"].to_pylist(), map(dict, members)
    images, texts = (kept_rows(catalog, column, catalog.parts()[-1]).tolist() for column in ("image", "text"))
    for at, (image, text) in enumerate(zip(images, texts, strict=True), catalog.snapshot(1).rows):
        assert image < 0 or (keys[image] == keys[at] and old[f"{keys[at]}.jpg"] == new[f"{keys[at]}.jpg"])
        assert text < 0 or keys[text] == keys[at]
        same = keys[at] in keys[: catalog.snapshot(1).rows] and old[f"{keys[at]}.txt"] == new[f"{keys[at]}.txt"]
        assert (text >= 0) == same
    if extended and not other and not cut:  # all but those in the last block, in which the old tar ended
        assert sum(image >= 0 for image in images) >= len(before) - 8


def test_old_plans_keep_what_is_there_and_name_the_rest(run, pool, tmp_path):
    catalog = run(pool.folder).catalog
    old = make_plan(catalog, "old", PlanRequest("random", keep=0.6))
    drawn = np.flatnonzero(old.draw(0))
    pool(1, range(40))
    run(pool.folder, update=True)
    old = Plan(catalog, "old")
    assert np.flatnonzero(old.draw(0)).tolist() == drawn.tolist()
    with pytest.raises(UserError, match=r"1 of 3 shards can't .*01\.tar \(replaced by shard 3\): .*on_damaged"):
        Loader(old, batch_size=10)
    rows, replaced = read_all(catalog, old, on_damaged="replace", max_replaced=0.5)
    assert {item.row for item in replaced} <= set(range(30, 60)) and replaced
    assert not set(rows) & set(range(30, 60))
    assert all("replaced" in item.reason for item in replaced)
    new = make_plan(catalog, "new", PlanRequest("random", keep=0.6))
    states = {item["name"]: item["state"] for item in status(catalog)["plans"]}
    assert states == {"new": "complete", "old": "complete; 30 samples were replaced since"}
    assert new.pool == 100 and not new.draw(0)[30:60].any()
    rows, replaced = read_all(catalog, new)
    assert not replaced and set(rows) <= set(np.flatnonzero(new.draw(0)).tolist())
    assert export_plan(old, "keys", tmp_path / "old.txt", epoch=0) == len(set(drawn) - set(range(30, 60)))
    export_plan(new, "keys", tmp_path / "new.txt", epoch=0)
    export_plan(new, "rates-json", tmp_path / "rates.json", epoch=0)
    export_plan(new, "shards", tmp_path / "shards", epoch=0)
    reasons = write_excluded(catalog, tmp_path / "excluded.parquet", new)
    assert reasons["remove", "its file was replaced (import --update)"] == 30
    stories = why(catalog, "01003")["samples"]
    assert [bool(story["removed"]) for story in stories] == [True, False]


def test_removals_hold_for_the_new_samples(run, pool, tmp_path):
    """By key, by uid, and by shard and key: a sample that was removed does not come back with another download."""
    catalog = run(pool.folder).catalog
    uid = table(catalog, "uid")["uid"][40].as_py().hex()
    (tmp_path / "gone.txt").write_text(f"01003\n{uid}\n")
    remove(catalog, tmp_path / "gone.txt")
    place = {"key": ["01004"], "shard": [str(pool.folder / "01.tar")]}
    pq.write_table(pa.table(place), tmp_path / "place.parquet")
    remove(catalog, tmp_path / "place.parquet")
    for rows in (range(40), range(41)):
        pool(1, rows)
        run(pool.folder, update=True)
        assert {"01003", "01004", "01010"} & live(catalog).keys() == set()
    place = {"key": ["01005"], "shard": [str(pool.folder / "01.tar")]}  # the file as it is now
    pq.write_table(pa.table(place), tmp_path / "place.parquet")
    report = remove(catalog, tmp_path / "place.parquet")
    assert (report.removed, report.several) == (1, 0)
    pool(1, range(42))
    run(pool.folder, update=True)
    assert {"01003", "01004", "01005", "01010"} & live(catalog).keys() == set()
    assert len(live(catalog)) == 60 + 42 - 4
    catalog.folder.joinpath("removals", "found").rename(tmp_path / "found")
    assert len(live(catalog)) == 60 + 42 - 4


def test_an_interrupted_update_resumes(run, pool, interrupted, tree_bytes, tmp_path):
    catalog = run(pool.folder).catalog
    for shard in (0, 2):
        pool(shard, range(35))
    pool(3, range(10))
    shutil.copytree(catalog.folder, tmp_path / "whole")
    import_pool(pool.folder, tmp_path / "whole", workers=1, part_rows=PART_ROWS, max_rejected=1.0, update=True)
    with interrupted(module, "write_record"):
        run(pool.folder, update=True)
    with interrupted(type(catalog), "append_snapshot"):
        run(pool.folder, update=True)
    assert len(live(catalog)) == 90 and not catalog.replaced()
    with interrupted(type(catalog.series("snapshots")), "append"):
        run(pool.folder, update=True)
    assert len(live(catalog)) == 90 and not catalog.replaced()
    report = run(pool.folder, update=True)
    assert report.new_samples == 80 and catalog.replaced() == {0: 3, 2: 4}
    assert tree_bytes(catalog.folder) == tree_bytes(tmp_path / "whole")


def test_after_an_interrupted_update_another_import_replaces_nothing(run, pool, interrupted):
    catalog = run(pool.folder).catalog
    pool(0, range(35))
    pool(3, range(10))
    with interrupted(type(catalog.series("snapshots")), "append"):
        run(pool.folder, update=True)
    run(pool.folder / "03.tar")
    assert not catalog.replaced() and len(live(catalog)) == 100


def test_captions_are_joined_to_the_new_samples(run, pool, tmp_path):
    catalog = run(pool.folder).catalog
    pool(1, range(40))
    run(pool.folder, update=True)
    (tmp_path / "captions.tsv").write_text("key\tcaption\n01002\tnew caption\n")
    join_captions(catalog, [tmp_path / "captions.tsv"], CaptionsRequest(name="recap"))
    rows = live(catalog)
    assert Captions(catalog, "recap").of(np.array([rows["01002"], 32])) == ["new caption", None]


def test_parquet_files_with_images(tmp_path, make_image):
    def write(rows):
        images = [make_image(row) for row in rows]
        columns = {"key": [f"{row:03d}" for row in rows], "jpg": images, "caption": [f"caption {row}" for row in rows]}
        pq.write_table(pa.table(columns), tmp_path / "0.parquet")

    write(range(20))
    catalog = import_pool(tmp_path / "0.parquet", tmp_path / "c", workers=1).catalog
    embed(catalog, EmbedRequest(encoder="pixels", workers=1, column="image"))
    write(range(5, 30))
    assert import_pool(tmp_path / "0.parquet", tmp_path / "c", workers=1).changed
    import_pool(tmp_path / "0.parquet", tmp_path / "c", workers=1, update=True)
    embed(catalog, EmbedRequest(encoder="pixels", workers=1, column="image"))
    assert sorted(live(catalog)) == [f"{row:03d}" for row in range(5, 30)]
    plan = make_plan(catalog, "p", PlanRequest("random", keep=0.8))
    assert not read_all(catalog, plan)[1]
    shutil.copy(tmp_path / "0.parquet", tmp_path / "1.parquet")
    (tmp_path / "0.parquet").write_bytes(b"PAR1")  # a cut download
    for update in (False, True):
        report = import_pool(tmp_path, tmp_path / "c", workers=1, update=update)
        assert report.changed == [str(tmp_path / "0.parquet")]
    assert catalog.snapshot().rows == 20 + 25 + 25


def test_uids_of_the_source_and_of_tailwise(run, pool, make_tar, make_members, tmp_path):
    catalog = run(pool.folder).catalog
    pool(1, range(40))
    run(pool.folder, update=True)
    with pytest.raises(UserError, match="has none"):  # a uid that is kept is no uid of the source
        export_plan(make_plan(catalog, "p", PlanRequest("random", keep=1.0)), "datacomp", tmp_path / "p.npy", epoch=0)
    for rows in (20, 30):
        uids = [(f"09{row:03d}.json", f'{{"uid": "{row:032x}"}}'.encode()) for row in range(rows)]
        make_tar(tmp_path / "own" / "09.tar", [*make_members(9, range(rows)), *uids])
        own = import_pool(tmp_path / "own", tmp_path / "c", workers=1, update=True).catalog
    assert own.replaced() == {0: 1} and len(live(own)) == 30
    plan = make_plan(own, "p", PlanRequest("random", keep=1.0))
    assert export_plan(plan, "datacomp", tmp_path / "own.npy", epoch=0) == 30


def test_lists_of_urls(tmp_path):
    def write(rows):
        columns = {"url": [f"https://{row}" for row in rows], "caption": [f"caption {row}" for row in rows]}
        pq.write_table(pa.table(columns), tmp_path / "0.parquet")

    write(range(10))
    import_pool(tmp_path / "0.parquet", tmp_path / "c", workers=1)
    write(range(5, 20))
    catalog = import_pool(tmp_path / "0.parquet", tmp_path / "c", workers=1, update=True).catalog
    plan = make_plan(catalog, "p", PlanRequest("random", keep=1.0))
    assert export_plan(plan, "urls", tmp_path / "drawn.parquet") == 15
    assert pq.read_table(tmp_path / "drawn.parquet")["url"].to_pylist() == [f"https://{row}" for row in range(5, 20)]


def test_captions_by_url_and_in_json(run, make_tar, make_members, tmp_path):
    """The JSON of a tar that was replaced is not read."""
    for rows in (6, 9):
        jsons = [
            (f"00{row:03d}.json", f'{{"url": "https://{row}", "alt": "alt {row}"}}'.encode()) for row in range(rows)
        ]
        make_tar(tmp_path / "pool" / "0.tar", [*make_members(0, range(rows)), *jsons])
        catalog = run(tmp_path / "pool", update=True).catalog
    (tmp_path / "captions.tsv").write_text("url\tcaption\nhttps://2\tnew caption\n")
    join_captions(catalog, [tmp_path / "captions.tsv"], CaptionsRequest(name="recap"))
    join_captions(catalog, ["json:alt"], CaptionsRequest(name="alt"))
    row = np.array([live(catalog)["00002"]])
    assert Captions(catalog, "recap").of(row) == ["new caption"]
    assert Captions(catalog, "alt").of(row) == ["alt 2"]
