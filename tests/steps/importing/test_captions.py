"""Captions from tables: every identifier and form of table, what is left out, and what cannot be read."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.catalog import Catalog
from tailwise.catalog.captions import Captions
from tailwise.errors import UserError
from tailwise.export import export
from tailwise.loader.captions import CaptionMix
from tailwise.loader.loader import Loader
from tailwise.requests import CaptionsRequest, ExportRequest, PlanRequest, ScoreRequest
from tailwise.shards.columns import MAX_TEXT_BYTES
from tailwise.steps.importing import captions as module
from tailwise.steps.importing.captions import join_captions
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.scores import score_config, score_parts

RECAP = CaptionsRequest(name="recap")


def texts(catalog, name="recap"):
    captions = Captions(catalog, name)
    return captions.of(np.arange(captions.snapshot.rows))


@pytest.fixture
def uids(small_catalog):
    return [
        uid.hex() for part in small_catalog.parts() for uid in small_catalog.samples(part, ["uid"])["uid"].to_pylist()
    ]


# --- forms and identifiers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parquet", "csv", "tsv", "jsonl"])
def test_every_form_gives_the_same(small_catalog, tmp_path, small_pieces, monkeypatch, form):
    rows = np.random.default_rng(0).permutation(600)[:500]
    columns = {
        "key": [f"{row:06d}" for row in rows],
        "Caption": [f"{row} é{'' if form == 'tsv' else ', x'}" for row in rows],
    }
    tables = []
    for number, span in enumerate((slice(0, 200), slice(200, 500))):
        mine = {name: values[span] for name, values in columns.items()}
        tables.append(path := tmp_path / f"{number}.{form}")
        pairs = list(zip(*mine.values(), strict=True))
        if form == "parquet":
            pq.write_table(pa.table({**mine, "Caption": pa.array(mine["Caption"]).dictionary_encode()}), path)
        elif form == "jsonl":
            path.write_text("\n".join(json.dumps({"key": key, "Caption": text}) for key, text in pairs))
        else:
            quote, mark = ('"', ",") if form == "csv" else ("", "\t")
            path.write_text("\n".join([mark.join(mine), *(f"{key}{mark}{quote}{text}{quote}" for key, text in pairs)]))
    monkeypatch.setattr("tailwise.steps.importing.join.BATCH", 37)
    with small_pieces():
        made = join_captions(small_catalog, tables, RECAP)
    expected = dict(zip(rows.tolist(), columns["Caption"], strict=True))
    assert texts(small_catalog) == [expected.get(row) for row in range(600)]
    assert not made.rejections.counts and made.captions.summary["captions"] == 500
    shuffled = np.random.default_rng(1).permutation(600)
    assert made.captions.of(shuffled) == [expected.get(row) for row in shuffled.tolist()]


@pytest.mark.parametrize("by", ["uid", "key", "image_path"])
def test_samples_are_named_by_what_the_catalog_holds(small_catalog, uids, tmp_path, by):
    keys = [f"{row:06d}" for row in range(600)]
    shards = np.repeat(["00000", "00001", "00002"], (260, 200, 140))
    names = {
        "uid": [uid.upper() for uid in uids],
        "key": keys,
        "image_path": [f"x/{shard}.tar/{key}.jpg" for shard, key in zip(shards, keys, strict=True)],
    }
    pq.write_table(pa.table({"ID": names[by], "n": ["no"] * 600, "text": keys}), tmp_path / "t.parquet")
    join_captions(small_catalog, [tmp_path], CaptionsRequest(name="recap", by=by, id_column="ID"))
    assert texts(small_catalog) == keys


@pytest.mark.parametrize("place", ["sidecar", "json"])
def test_samples_are_named_by_what_img2dataset_notes(tmp_path, make_tar, make_image, place):
    hashes = [hashlib.sha256(bytes([row])).hexdigest() for row in range(12)]
    for shard in range(2):
        members, notes = [], []
        for row in range(6 * shard, 6 * shard + 6):
            about = {"key": f"{row:03d}", "url": f"https://x/{row % 11}?a=é", "sha256": hashes[row]}
            notes.append({**about, "status": "success"})
            members += [(f"{row:03d}.jpg", make_image(row)), (f"{row:03d}.txt", b"own")]
            if place == "json" and row != 3:
                members.append((f"{row:03d}.json", json.dumps(about).encode()))
        make_tar(tmp_path / "shards" / f"{shard}.tar", members)
        if place == "sidecar":
            pq.write_table(pa.Table.from_pylist(notes), tmp_path / "shards" / f"{shard}.parquet")
    catalog = import_pool(tmp_path / "shards", tmp_path / "pool").catalog
    found = [*range(12)] if place == "sidecar" else [row if row != 3 else None for row in range(12)]
    pq.write_table(
        pa.table({"SHA256": [one.upper() for one in hashes], "re_caption": [f"new {row}" for row in range(12)]}),
        tmp_path / "h.parquet",
    )
    join_captions(catalog, [tmp_path / "h.parquet"], CaptionsRequest(name="hash", by="sha256"))
    assert texts(catalog, "hash") == [None if row is None else f"new {row}" for row in found]
    pq.write_table(
        pa.table({"URL": [f"https://x/{row}?a=é" for row in range(11)], "TEXT": [f"new {row}" for row in range(11)]}),
        tmp_path / "u.parquet",
    )
    made = join_captions(catalog, [tmp_path / "u.parquet"], CaptionsRequest(name="url"))
    assert texts(catalog, "url") == [None if row in {0, 11, None} else f"new {row}" for row in found]
    assert made.rejections.counts["captions", "ambiguous url"] == 1
    pq.write_table(pa.table({"url": ["https://x/0?a=é"], "text": ["new"]}), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"belongs to a sample \(ambiguous url: 1\)$"):
        join_captions(catalog, [tmp_path / "twice.parquet"], CaptionsRequest(name="x"))
    with pytest.raises(UserError, match="none of the captions"):
        join_captions(catalog, [tmp_path / "u.parquet"], CaptionsRequest(name="x", by="sha256", id_column="URL"))


@pytest.mark.parametrize("key", ["key", "uid", None])
def test_samples_of_parquet_files_with_images(tmp_path, make_image, key):
    hashes = [f"{row:064x}" for row in range(9)]
    columns = {"jpg": [make_image(row) for row in range(9)], "caption": ["own"] * 9, "sha256": hashes}
    columns |= {key: [f"{row:032X}" for row in range(9)]} if key else {}
    pq.write_table(pa.table(columns), tmp_path / "images.parquet", row_group_size=4)
    catalog = import_pool(tmp_path / "images.parquet", tmp_path / "pool").catalog
    (tmp_path / "t.csv").write_text(
        "\n".join(["sha256,text", *(f"{one},new {at}" for at, one in enumerate(hashes[1:], 1))])
    )
    join_captions(catalog, [tmp_path / "t.csv"], RECAP)
    assert texts(catalog) == [None, *(f"new {row}" for row in range(1, 9))]
    plan = make_plan(catalog, "all", PlanRequest(method="random", keep=1.0))
    batch = next(iter(Loader(plan, batch_size=9, captions={"recap": 1})))
    assert batch.texts == ["own" if row == 0 else f"new {row}" for row in batch.rows.tolist()]
    assert batch.images == [make_image(row) for row in batch.rows.tolist()]
    with pytest.raises(UserError, match="no sample of"):
        join_captions(catalog, ["json:a"], CaptionsRequest(name="x"))


def test_samples_of_folders_of_files(tmp_path, make_image):
    for row in range(4):
        (tmp_path / "files" / "00000").mkdir(parents=True, exist_ok=True)
        place = tmp_path / "files" / "00000" / f"{row}"
        place.with_suffix(".jpg").write_bytes(make_image(row))
        place.with_suffix(".txt").write_text("own")
        place.with_suffix(".json").write_text(json.dumps({"url": f"u{row}", "alt": f"alt {row}"}))
    catalog = import_pool(tmp_path / "files", tmp_path / "pool", format_name="files").catalog
    (tmp_path / "t.csv").write_text("url,caption\nu2,two\nu0,none\n")
    join_captions(catalog, [tmp_path / "t.csv"], RECAP)
    join_captions(catalog, ["json:alt"], CaptionsRequest(name="alt"))
    assert texts(catalog) == ["none", None, "two", None]
    assert texts(catalog, "alt") == [f"alt {row}" for row in range(4)]


@pytest.mark.parametrize("id_column", ["uid", "SAMPLE_ID", None])
def test_samples_of_lists_are_named_by_their_url(tmp_path, id_column):
    rows = range(8)
    ids = {"uid": [f"{row:032X}" for row in rows], "SAMPLE_ID": [100 - row for row in rows]}.get(id_column)
    urls = [f"https://x/{row}" for row in rows]
    table = {"url" if id_column == "uid" else "URL": urls, "text" if id_column == "uid" else "TEXT": ["own"] * 8}
    pq.write_table(pa.table({**table, **({id_column: ids} if ids else {})}), tmp_path / "list.parquet")
    catalog = import_pool(tmp_path / "list.parquet", tmp_path / "pool").catalog
    pq.write_table(pa.table({"url": urls[::-1], "caption": urls[::-1]}), tmp_path / "t.parquet")
    join_captions(catalog, [tmp_path / "t.parquet"], RECAP)
    assert texts(catalog) == urls
    plan = make_plan(catalog, "all", PlanRequest(method="random", keep=1.0, seed=3))
    export(plan, "urls", tmp_path / "urls.parquet", epoch=0, request=ExportRequest(captions="recap:1,original:1"))
    written = pq.read_table(tmp_path / "urls.parquet").to_pylist()
    chosen = CaptionMix(catalog, {"original": 0.5, "recap": 0.5}, 3).of(np.arange(8), np.zeros(8, np.int32))
    assert [row["caption"] for row in written] == [text or "own" for text in chosen.texts]
    assert {"own"} < {row["caption"] for row in written}


# --- what is left out ---------------------------------------------------------------------------------------------------


def test_every_row_gets_a_caption_or_a_reason(small_catalog, tmp_path, rejected_counts):
    long, broken = "x" * (MAX_TEXT_BYTES + 1), b"caf\xe9"
    rows = [
        *[(f"{row:06d}", f"first {row}".encode()) for row in range(300)],
        *[("000005", b"second"), ("nobody", b"n"), (None, b"n"), ("000400", None), ("000401", b"")],
        *[("000402", long.encode()), ("000403", broken), ("000404", "é\n\0".encode())],
    ]
    keys, captions = zip(*rows, strict=True)
    captions = pa.Array.from_buffers(pa.string(), len(rows), pa.array(captions, pa.binary()).buffers())
    pq.write_table(pa.table({"key": keys, "caption": captions}), tmp_path / "t.parquet")
    made = join_captions(small_catalog, [tmp_path / "t.parquet"], RECAP)
    found = texts(small_catalog)
    assert found[:300] == [f"first {row}" for row in range(300)]
    assert {row: text for row, text in enumerate(found[300:], 300) if text} == {404: "é\n\0"}
    expected = {
        "duplicate caption": 1,
        "caption without sample": 2,
        "no caption in the row": 2,
        "caption is too long": 1,
        "caption is not UTF-8": 1,
    }
    assert made.captions.summary["reasons"] == expected
    assert {
        reason: count for (stage, reason), count in rejected_counts(small_catalog).items() if stage == "captions"
    } == expected
    summary = made.captions.summary
    assert summary["rows"] == len(rows) == summary["captions"] + sum(expected.values())


def test_too_many_unusable_rows_are_refused(small_catalog, tmp_path):
    pq.write_table(pa.table({"key": ["000000", "000001"], "caption": ["a", "x" * 2_000_000]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"1 of 2 captions \(50.0%\) can't be used.*too long: 1"):
        join_captions(small_catalog, [tmp_path / "t.parquet"], RECAP)
    join_captions(small_catalog, [tmp_path / "t.parquet"], CaptionsRequest(name="recap", max_rejected=0.5))
    assert texts(small_catalog)[:2] == ["a", None]


HOSTILE = {
    "list.parquet": ({"key": ["000000"], "caption": [["a", "b"]]}, "not text"),
    "float.parquet": ({"key": ["000000"], "caption": [0.5]}, "not text"),
    "none.parquet": ({"key": ["000000"], "c": ["a"]}, "none called caption, text"),
    "nobody.parquet": ({"name": ["000000"], "caption": ["a"]}, "none called uid, key"),
    "empty.parquet": ({"key": pa.array([], pa.string()), "caption": pa.array([], pa.string())}, "there are none"),
    "strange.parquet": ({"key": ["x"], "caption": ["a"]}, "key is 'x', the first sample's key '000000'"),
    "broken.parquet": (b"PAR1 no", "can't be read as Parquet"),
    "latin.csv": (b"key,caption\n000000,caf\xe9\n", "not UTF-8"),
    "quote.csv": (b'key,caption\n000000,"a\n', "quote that isn't closed"),
    "fields.tsv": (b"key\tcaption\n000000\n", "has 1 fields"),
    "broken.jsonl": (b'{"key": "000000", "caption": "a"}\n{', "line 2 is not JSON"),
    "list.jsonl": (b"[1]\n", "not a JSON object"),
    "mixed.jsonl": (b'{"key": "000000", "caption": "a"}\n{"key": "000001", "caption": {}}', "can't be read"),
    "nothing.jsonl": (b"", "none called"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_tables_that_cannot_be_read_are_one_clear_line(small_catalog, tmp_path, run_tailwise, name):
    content, said = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else pq.write_table(pa.table(content), path)
    found = run_tailwise("captions", small_catalog.folder, path, "--name", "recap", code=2)
    assert said in found.stderr and found.stderr.count("\n") == 1
    assert not (small_catalog.folder / "captions" / "recap").exists()


def test_wrong_requests_are_refused(small_catalog, tmp_path):
    pq.write_table(pa.table({"key": ["000000"], "caption": ["a"]}), tmp_path / "t.parquet")
    for request, said in (
        (CaptionsRequest(name="original"), "samples' own"),
        (CaptionsRequest(name="a/b"), "can't name"),
        (CaptionsRequest(name="x", by="row"), "`by` 'row'"),
        (CaptionsRequest(name="x", by="uid"), "none called uid"),
        (CaptionsRequest(name="x", by="key", id_column="Key"), "none called Key"),
        (CaptionsRequest(name="x", column="text"), "none called text"),
    ):
        with pytest.raises(UserError, match=said):
            join_captions(small_catalog, [tmp_path / "t.parquet"], request)
    with pytest.raises(UserError, match="is no table"):
        join_captions(small_catalog, [tmp_path / "absent.csv"], RECAP)
    with pytest.raises(UserError, match="no captions named 'recap'"):
        Captions(small_catalog, "recap")


# --- reruns, other tables, newer samples ---------------------------------------------------------------------------------


def test_captions_are_made_once(small_catalog, tmp_path, interrupted):
    path = tmp_path / "t.parquet"
    pq.write_table(
        pa.table({"key": [f"{row:06d}" for row in range(600)], "caption": [f"c{row}" for row in range(600)]}), path
    )
    with interrupted(module, "_write", lambda _, join, item: item[0].number == 1):
        join_captions(small_catalog, [path], RECAP)
    join_captions(small_catalog, [path], RECAP)
    before = {item: item.stat().st_mtime_ns for item in (small_catalog.folder / "captions" / "recap").iterdir()}
    join_captions(small_catalog, [path], RECAP)
    assert before == {item: item.stat().st_mtime_ns for item in before}
    pq.write_table(pa.table({"key": ["000000"], "caption": ["other"]}), path)
    with pytest.raises(UserError, match="tables changed since"):
        join_captions(small_catalog, [path], RECAP)


def test_newer_samples_have_none(small_catalog, tmp_path, make_tar, make_image):
    pq.write_table(pa.table({"key": ["000599"], "caption": ["last"]}), tmp_path / "t.parquet")
    captions = join_captions(small_catalog, [tmp_path / "t.parquet"], RECAP).captions
    make_tar(tmp_path / "more" / "9.tar", [("z.jpg", make_image()), ("z.txt", b"z")])
    import_pool(tmp_path / "more", small_catalog.folder)
    assert captions.of(np.array([600, 599, 0])) == [None, "last", None]
    assert Captions(Catalog.open(small_catalog.folder), "recap").of(np.array([600])) == [None]


# --- embeddings and scores of them --------------------------------------------------------------------------------------


@pytest.fixture
def recap(small_catalog, tmp_path):
    """Captions of all but the last 100 samples of `small_catalog`: of row r, r % 7 + 1 words."""
    table = {
        "key": [f"{row:06d}" for row in range(500)],
        "caption": [" ".join(["w"] * (row % 7 + 1)) for row in range(500)],
    }
    pq.write_table(pa.table(table), tmp_path / "recap.parquet")
    return join_captions(small_catalog, [tmp_path / "recap.parquet"], RECAP).captions


def test_scores_count_in_joined_captions(small_catalog, recap):
    def words(**options):
        request = ScoreRequest("caption-words", options)
        return np.concatenate(list(score_parts(small_catalog, small_catalog.snapshot(), request)))

    assert words(captions="recap").tolist() == [row % 7 + 1 for row in range(500)] + [2] * 100  # own ones are "group G"
    assert words().tolist() == [2] * 600
    assert score_config(ScoreRequest("caption-words")) == {"name": "caption-words"}  # as before there were others
    assert score_config(ScoreRequest("caption-words", {"captions": "recap"}))["captions"] == "recap"
    with pytest.raises(UserError, match=r"no captions named 'reca' .*did you mean 'recap'"):
        words(captions="reca")


def test_a_column_notes_its_captions(small_catalog, recap, run_tailwise):
    from tailwise.steps.embedding.read import ShardRows, pieces

    found = list(pieces(small_catalog, "text", [ShardRows(1, 0, 260, 200), ShardRows(2, 1, 0, 140)], 64, "recap"))
    texts_read = [text for piece in found for text in piece.samples["caption"]]
    own = [
        text
        for part in small_catalog.parts()
        for text in small_catalog.samples(part, ["caption"])["caption"].to_pylist()
    ]
    assert texts_read == [new or old for new, old in zip(recap.of(np.arange(260, 600)), own[260:], strict=True)]
    assert [recap.lacking(part) for part in small_catalog.parts()] == [0, 100]
    for words, said in (
        (["--column", "image"], "does nothing"),
        (["--column", "text", "--captions", "none"], "no captions named"),
    ):
        captions = [] if "--captions" in words else ["--captions", "recap"]
        command = ["embed", small_catalog.folder, "--encoder", "pixels", *words, *captions]
        assert said in run_tailwise(*command, code=2).stderr


# --- captions in the JSON -----------------------------------------------------------------------------------------------


def test_captions_in_json_stand_beside_others(tmp_path, make_tar, make_image, rejected_counts):
    told = {
        1: {"blip": {"text": "blip 1"}, "alt": "alt 1"},
        2: {"alt": "alt 2"},
        3: {"blip": {"text": ""}, "alt": "alt 3"},
        4: {"blip": {"text": "x" * (MAX_TEXT_BYTES + 1)}},
        5: {"blip": {"text": "\ud800"}},
        6: {"blip": 7},
    }
    for shard in range(2):
        members = []
        for row in range(4 * shard, 4 * shard + 4):
            members += [(f"{row}.jpg", make_image(row)), (f"{row}.txt", b"own")]
            members += [(f"{row}.json", json.dumps(told[row]).encode())] if row in told else []
        make_tar(tmp_path / "shards" / f"{shard}.tar", members)
    catalog = import_pool(tmp_path / "shards", tmp_path / "pool", workers=1, part_rows=2).catalog
    join_captions(catalog, ["json:blip.text,json:alt"], CaptionsRequest(name="blip"))
    assert texts(catalog, "blip") == [None, "blip 1", "alt 2", "alt 3", None, None, None, None]
    assert rejected_counts(catalog)["captions", "caption is too long"] == 1
    assert rejected_counts(catalog)["captions", "no caption in the JSON"] == 4
    for tables, request, said in (
        (["json:none"], CaptionsRequest(name="x"), "no sample of .* has a caption in none"),
        (["json:alt", "t.csv"], CaptionsRequest(name="x"), "can't be combined with tables"),
        (["json:alt,txt"], CaptionsRequest(name="x"), "fields of the JSON alone"),
        (["json:alt"], CaptionsRequest(name="x", by="uid"), "`by` does nothing with json:alt"),
    ):
        with pytest.raises(UserError, match=said):
            join_captions(catalog, tables, request)
    join_captions(catalog, ["json:alt"], CaptionsRequest(name="x"))
    assert texts(catalog, "x") == [None, "alt 1", "alt 2", "alt 3", None, None, None, None]
