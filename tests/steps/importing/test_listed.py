"""Subsets, rates and opt-outs made elsewhere: what an import keeps to match them, and what filters, plans and removals do with them."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tailwise.catalog import Catalog
from tailwise.catalog.drops import DropList
from tailwise.catalog.files import read_record, write_record
from tailwise.catalog.noted import HASH_COLUMNS, noted_hash, noted_hashes
from tailwise.cli import app
from tailwise.errors import UserError
from tailwise.plan import Plan
from tailwise.requests import FilterRequest, NamedScoreRequest, PlanRequest, ScoreRequest
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.filter import filter_samples, try_filter
from tailwise.steps.scoring.named import make_named_score
from tailwise.steps.scoring.scores import score_parts
from tailwise.steps.upkeep.remove import remove

ROWS = 200
UIDS = [hashlib.md5(b"uid %d" % row).hexdigest() for row in range(ROWS)]
URLS = [f"https://x.org/{row % 190}.jpg?é" for row in range(ROWS)]  # the last ten repeat the first ten
SHA256 = [hashlib.sha256(b"%d" % (row % 195)).hexdigest() for row in range(ROWS)]
MD5 = [hashlib.md5(b"%d" % row).hexdigest() for row in range(ROWS)]
NOTES = {"uid": UIDS, "url": URLS, "sha256": SHA256, "md5": MD5}


@pytest.fixture(scope="module")
def source(tmp_path_factory, make_tar, make_image):
    """A folder with the catalog of 200 samples in four tars (two parts), whose JSON notes uid, url, sha256 and md5."""
    folder, image = tmp_path_factory.mktemp("listed"), make_image()
    for shard in range(4):
        members = []
        for row in range(50 * shard, 50 * shard + 50):
            about = {name: values[row] for name, values in NOTES.items()} | {"width": 8, "height": 8}
            members += [
                (f"{row:03d}.jpg", image),
                (f"{row:03d}.txt", b"c" * (row + 1)),
                (f"{row:03d}.json", json.dumps(about).encode()),
            ]
        make_tar(folder / "pool" / f"{shard:05d}.tar", members)
    import_pool(folder / "pool", folder / "catalog", workers=1, part_rows=100)
    return folder


@pytest.fixture
def catalog(source, tmp_path):
    import shutil

    shutil.copytree(source / "catalog", tmp_path / "catalog")
    return Catalog.open(tmp_path / "catalog")


def kept(catalog, name):
    """The rows that a drop list keeps."""
    return np.flatnonzero(~np.asarray(DropList(catalog, name).mask[:])).tolist()


def subset(path, rows):
    """Write DataComp's subset file of some rows, as its authors do."""
    pairs = [(int(UIDS[row][:16], 16), int(UIDS[row][16:], 16)) for row in rows]
    np.save(path, np.sort(np.array(pairs, np.dtype("u8,u8"))))
    return path


# --- what an import keeps ----------------------------------------------------------------------------------------------


def test_hashes_of_one_and_of_many_are_the_same():
    for name in HASH_COLUMNS:
        texts = [*NOTES[name][:9], "", "x" * 3, None, NOTES[name][3].upper() if name != "url" else "U"]
        assert noted_hashes(name, pa.array(texts, pa.string())).to_pylist() == [
            noted_hash(name, text) for text in texts
        ]
    assert noted_hash("sha256", SHA256[0]) == noted_hash("sha256", SHA256[0].upper())
    assert noted_hash("md5", MD5[0]) == bytes.fromhex(MD5[0])


def stored(catalog, name):
    column = HASH_COLUMNS[name]
    return [value for part in catalog.parts() for value in catalog.samples(part, [column]).column(0).to_pylist()]


def test_an_import_keeps_what_json_sidecars_metadata_and_parquet_note(catalog, tmp_path, make_pool, make_image):
    expected = {name: [noted_hash(name, text) for text in NOTES[name]] for name in HASH_COLUMNS}
    assert {name: stored(catalog, name) for name in HASH_COLUMNS} == expected
    columns = {name: NOTES[name] for name in HASH_COLUMNS}
    ((path, keys),) = make_pool(tmp_path / "tars", [ROWS]).items()
    sidecar = {"key": keys, "status": ["success"] * ROWS, **columns}
    pq.write_table(pa.table({**sidecar, "url": [None, *URLS[1:]]}), path.with_suffix(".parquet"))
    made = import_pool(tmp_path / "tars", tmp_path / "of-tars", workers=1).catalog
    assert stored(made, "url") == [None, *expected["url"][1:]] and stored(made, "sha256") == expected["sha256"]
    table = {"SAMPLE_ID": range(ROWS), "URL": URLS, "TEXT": ["c"] * ROWS, "MD5": [m.upper() for m in MD5]}
    (tmp_path / "laion").mkdir()
    pq.write_table(pa.table(table), tmp_path / "laion" / "0.parquet")
    made = import_pool(tmp_path / "laion", tmp_path / "of-laion", workers=1).catalog
    assert stored(made, "url") == expected["url"] and stored(made, "md5") == expected["md5"]
    (tmp_path / "images").mkdir()
    images = {"jpg": [make_image()] * ROWS, "caption": ["c"] * ROWS, **columns, "md5": range(ROWS)}
    pq.write_table(pa.table(images), tmp_path / "images" / "0.parquet")
    made = import_pool(tmp_path / "images", tmp_path / "of-images", workers=1).catalog
    assert stored(made, "sha256") == expected["sha256"] and stored(made, "url") == expected["url"]
    assert HASH_COLUMNS["md5"] not in made.samples(made.parts()[0]).column_names  # a number is no md5


# --- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["npy", "json", "csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["uid", "key", "shard", "url", "sha256", "md5"])
def test_scores_of_every_form_and_kind_come_back_where_a_twentieth_is_missing_on_both_sides(
    catalog, tmp_path, form, kind
):
    if (form == "npy" and kind != "uid") or (form == "json" and kind == "shard"):
        pytest.skip("no such file")
    paths, keys = catalog.shards()["path"].to_pylist(), [f"{row:03d}" for row in range(ROWS)]
    pairs = [(paths[row // 50], keys[row]) for row in range(ROWS)]
    names = {**NOTES, "key": keys, "shard": pairs}[kind]
    random = np.random.default_rng(2)
    values = {name: round(random.normal(), 6) for name in dict.fromkeys(names)}
    for name in random.permutation(len(values))[: len(values) // 20]:
        del values[list(values)[name]]
    expected = np.array([values.get(name, np.nan) for name in names], np.float32)
    count = len(values)
    strangers = [("elsewhere", f"s{at}") if kind == "shard" else f"{at + 1000:032x}" for at in range(count // 20)]
    given = {**values, **dict.fromkeys(strangers, 9.5)}
    used = ("shard", "key") if kind == "shard" else (kind,)
    rows = [(*(name if kind == "shard" else (name,)), value) for name, value in given.items()]
    path = tmp_path / f"scores.{form}"
    if form == "npy":
        records = [(int(name[:16], 16), int(name[16:], 16), value) for name, value in given.items()]
        np.save(path, np.array(records, np.dtype("u8,u8,f8")))
    elif form == "json":
        path.write_text(json.dumps(given))
    elif form == "parquet":
        pq.write_table(pa.table(dict(zip((*used, "q"), zip(*rows, strict=True), strict=True))), path)
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps(dict(zip((*used, "q"), row, strict=True))) for row in rows))
    else:
        mark = "," if form == "csv" else "\t"
        path.write_text("\n".join(mark.join(map(str, row)) for row in ((*used, "q"), *rows)))
    request = NamedScoreRequest(name="q", file=path, match=kind, strict=0.95)
    summary = make_named_score(catalog, request)
    read = score_parts(catalog, catalog.snapshot(), ScoreRequest("q"))
    assert np.array_equal(np.concatenate(list(read)), expected, equal_nan=True)
    counts = {"names": len(given), "names_matched": count, "samples_matched": int((~np.isnan(expected)).sum())}
    assert {name: summary[name] for name in counts} == counts and summary["matched_by"] == kind
    with pytest.raises(UserError, match=rf"{len(strangers)} of {len(given)} names in .*scores.* belong to no sample"):
        make_named_score(catalog, replace(request, strict=0.96))
    filter_samples(catalog, FilterRequest("q", 0.0, name="positive"))
    assert kept(catalog, "positive") == np.flatnonzero(expected >= 0).tolist()


# --- filters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["npy", "txt", "csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["uid", "key", "shard", "url", "sha256", "md5"])
def test_every_form_and_kind_keeps_the_same_samples(catalog, tmp_path, form, kind):
    if (form == "npy" and kind != "uid") or (form == "txt" and kind == "shard"):
        pytest.skip("no such list")
    rows = np.random.default_rng(0).permutation(ROWS)[:100].tolist()
    paths = catalog.shards()["path"].to_pylist()
    columns = {
        **NOTES,
        "key": [f"{row:03d}" for row in range(ROWS)],
        "shard": [paths[row // 50] for row in range(ROWS)],
    }
    used = ("shard", "key") if kind == "shard" else (kind,)
    table = {name: [columns[name][row] for row in rows] + ["elsewhere"] * 5 for name in used}
    path = tmp_path / f"list.{form}"
    if form == "npy":
        subset(path, rows)
    elif form == "txt":
        path.write_text("\n".join(table[kind]))
    elif form == "parquet":
        pq.write_table(pa.table(table), path)
    elif form == "jsonl":
        path.write_text(
            "\n".join(json.dumps(dict(zip(table, row, strict=True))) for row in zip(*table.values(), strict=True))
        )
    else:
        mark = "," if form == "csv" else "\t"
        lines = [mark.join(used), *(mark.join(row) for row in zip(*table.values(), strict=True))]
        path.write_text(
            "\n".join(lines if form == "csv" or kind == "shard" else [f"{line}\t" for line in lines[:0]] + lines)
        )
    match = "md5" if kind == "md5" and form == "txt" else None  # 32 digits are a uid
    made = filter_samples(catalog, FilterRequest(only=path, match=match))
    twins = {"url": URLS, "sha256": SHA256}.get(kind)  # all samples of one url or image
    named = {twins[row] for row in rows} if twins else {*rows}
    expected = [row for row in range(ROWS) if (twins[row] if twins else row) in named]
    assert kept(catalog, "only") == expected
    found = made.summary
    assert found["matched_by"] == kind and found["samples_matched"] == len(expected)
    strange = 5 if kind in {"uid", "sha256", "md5"} else 1  # what is no such name is counted each time
    assert found["names_matched"] == len(named) and found["names"] == len(named) + strange * (form != "npy")
    filter_samples(catalog, FilterRequest(exclude=path, match=match))
    assert kept(catalog, "not") == [row for row in range(ROWS) if row not in expected]


def test_a_uid_that_is_given_twice_is_repeated_by_a_plan_and_kept_once_by_a_filter(catalog, tmp_path):
    path = subset(tmp_path / "twice.npy", [0, 1, 1, 7, 7, 7])
    made = filter_samples(catalog, FilterRequest(only=path))
    assert kept(catalog, "only") == [0, 1, 7] and made.summary["entries"] == 6 and made.summary["names"] == 3
    plan = make_plan(catalog, "p", PlanRequest("rates", rates=path))
    copies = np.zeros(ROWS, np.uint8)
    copies[[0, 1, 7]] = 1, 2, 3
    assert all(np.array_equal(plan.draw(epoch), copies) for epoch in (0, 5)) and not plan.changes
    (tmp_path / "urls.txt").write_text(f"{URLS[20]}\n{URLS[21]}\n{URLS[20]}\n")
    plan = make_plan(catalog, "urls", PlanRequest("rates", rates=tmp_path / "urls.txt"))
    assert plan.draw(0)[[20, 21, 22]].tolist() == [2, 1, 0] and plan.summary["matched_by"] == "url"
    subset(tmp_path / "often.npy", [3] * 256)
    with pytest.raises(UserError, match="a name is given 256 times"):
        make_plan(catalog, "often", PlanRequest("rates", rates=tmp_path / "often.npy"))


def test_dead_links_are_counted_refused_and_replaced(catalog, tmp_path):
    """5 % of the names of a published list have no sample."""
    rows = [*range(95)]
    path = tmp_path / "published.txt"
    path.write_text(
        "\n".join([*(UIDS[row] for row in rows), *(hashlib.md5(b"dead %d" % n).hexdigest() for n in range(5))])
    )
    with pytest.raises(
        UserError, match=r"5 of 100 names .* belong to no sample: the others are 95.00%, less than `strict` 0.96"
    ):
        filter_samples(catalog, FilterRequest(only=path, strict=0.96))
    assert not (catalog.folder / "drops" / "only").exists()
    assert filter_samples(catalog, FilterRequest(only=path, strict=0.95)).summary["kept"] == 95
    with pytest.raises(UserError, match=r"less than `strict` 0\.96"):  # the list is there
        filter_samples(catalog, FilterRequest(only=path, strict=0.96))
    made = filter_samples(catalog, FilterRequest(only=path, refill="caption-characters", name="longest"))
    assert kept(catalog, "longest") == [*rows, *range(195, 200)] and made.summary["filled"] == 5
    filter_samples(catalog, FilterRequest(exclude=subset(tmp_path / "some.npy", [3, 198, 199]), name="some"))
    request = FilterRequest(only=path, refill="random", seed=4, without=["some"], name="any")
    assert (
        try_filter(catalog, FilterRequest(only=path, refill="random", seed=4, without=["some"])).summary["kept"] == 100
    )
    filter_samples(catalog, request)
    drops = DropList(catalog, "any")
    there = sorted({*kept(catalog, "any")} - {3, 198, 199})  # what `without` drops is not in its mask
    assert drops.summary["filled"] == 6 and len(there) == 100 and {*rows} - {3} < {*there}
    again = FilterRequest(only=path, refill="random", seed=5, without=["some"], name="other")
    filter_samples(catalog, again)
    assert kept(catalog, "other") != kept(catalog, "any")
    longer = tmp_path / "longer.txt"
    longer.write_text(path.read_text() + "\n" + "\n".join(hashlib.md5(b"more %d" % n).hexdigest() for n in range(150)))
    with pytest.raises(UserError, match="155 samples are missing, and 105 others can take their place"):
        filter_samples(catalog, FilterRequest(only=longer, refill="random", name="x"))


def test_a_table_is_matched_by_the_names_that_fit_best(catalog, tmp_path):
    """Also if some of its uids and keys happen to be those of samples, and several samples have one of its keys."""
    others = [hashlib.md5(b"other %d" % row).hexdigest() for row in range(100)]
    names = {"uid": [UIDS[0], *others[1:]], "key": ["199"] * 100, "sha256": SHA256[:100], "url": [None, *URLS[1:100]]}
    pq.write_table(pa.table({**names, "rate": [0.5] * 100}), tmp_path / "t.parquet")
    filter_samples(catalog, FilterRequest(only=tmp_path / "t.parquet"))
    (tmp_path / "t.csv").write_text(
        "".join(["uid,key,url\n", *(f"{uid},k,{url}\n" for uid, url in zip(others, URLS, strict=False))])
    )
    assert kept(catalog, "only") == [*range(100), 195, 196, 197, 198, 199]
    filter_samples(catalog, FilterRequest(only=tmp_path / "t.csv", name="csv"))
    assert kept(catalog, "csv") == [*range(100), *range(190, 200)]
    filter_samples(catalog, FilterRequest(only=tmp_path / "t.parquet", match="uid", name="uids"))
    assert kept(catalog, "uids") == [0]
    make_plan(catalog, "p", PlanRequest(rates=tmp_path / "t.parquet", missing_rate=0))
    assert Plan(catalog, "p").summary["matched_by"] == "sha256"
    made = make_named_score(catalog, NamedScoreRequest(name="rate", file=tmp_path / "t.parquet"))
    assert made["matched_by"] == "sha256" and made["scored"] == 105


def test_rates_by_sha256_as_released(catalog, tmp_path):
    """A JSON of rates by the sha256 of the image: all samples of one image have its rate, and 5 % of the samples are missing."""
    rates = {SHA256[row]: float(row % 4) / 2 for row in range(190)} | {hashlib.sha256(b"gone").hexdigest(): 1.0}
    (tmp_path / "probabilities.json").write_text(json.dumps(rates))
    with pytest.raises(UserError, match=r"5 of 200 samples have no rate \(1 rates belong to no sample\)"):
        make_plan(catalog, "p", PlanRequest("rates", rates=tmp_path / "probabilities.json"))
    plan = make_plan(catalog, "p", PlanRequest("rates", rates=tmp_path / "probabilities.json", missing_rate=0.25))
    expected = [rates.get(SHA256[row], 0.25) for row in range(ROWS)]
    assert plan.rates[:].tolist() == expected and plan.summary["matched_by"] == "sha256"
    assert (plan.summary["names"], plan.summary["names_matched"], plan.summary["samples_matched"]) == (191, 190, 195)
    lines = ["URL,rate", *(f"{url},0.5" for url in URLS[:190])]
    (tmp_path / "rates.csv").write_text("\n".join(lines))
    plan = make_plan(catalog, "c", PlanRequest("rates", rates=tmp_path / "rates.csv"))
    assert set(plan.rates[:].tolist()) == {0.5}
    (tmp_path / "rates.csv").write_text("\n".join([*lines, lines[1]]))
    with pytest.raises(UserError, match="the rate of '000' is given twice"):
        make_plan(catalog, "d", PlanRequest("rates", rates=tmp_path / "rates.csv"))


def test_the_same_whatever_the_batches_buckets_and_parts(catalog, source, tmp_path, monkeypatch):
    path = subset(tmp_path / "s.npy", [1, 1, 2, 150, 199])
    one = make_plan(catalog, "a", PlanRequest("rates", rates=path)).rates[:].tolist()
    monkeypatch.setattr("tailwise.steps.importing.listed.BATCH", 2)
    monkeypatch.setattr("tailwise.execution.keys.BUCKET_ROWS", 30)
    import_pool(source / "pool", tmp_path / "whole", workers=1)
    other = make_plan(Catalog.open(tmp_path / "whole"), "a", PlanRequest("rates", rates=path)).rates[:].tolist()
    assert one == other and one[1] == 2.0


@pytest.mark.parametrize(
    ("content", "request_", "message"),
    [
        ("x.txt", {"match": "name"}, "`match` 'name': use uid, key, shard, url, sha256, md5"),
        ("x.npy", {"match": "key"}, "a .npy holds uids"),
        ("x.txt", {"match": "shard"}, "needs a table with the columns shard and key"),
        ("x.pdf", {}, "samples are read from .npy, .txt"),
        ("none.txt", {}, "is no file"),
        ("x.txt", {}, r"none of 2 names in .* \(the first is 'a'\) is the key of a sample; give a list of this pool"),
        ("x.txt", {"match": "url"}, "is the url of a sample; give a list"),
        ("empty.txt", {}, "empty.txt is empty: give a file that names samples"),
        ("flat.npy", {}, "1-D arrays of dtype u8,u8"),
        ("cut.npy", {}, "can't be read"),
        ("x.csv", {}, "needs one of uid, shard, key"),
        ("x.txt", {"strict": 2.0}, "`strict` 2.0: must lie between 0 and 1"),
        ("x.txt", {"keep": 0.5}, "`keep` does nothing with `only`, without `refill`"),
        ("x.txt", {"seed": 1}, "`seed` does nothing"),
        ("x.txt", {"by": "width"}, "give one of `by` SCORE, `only` FILE and `exclude` FILE"),
    ],
)
def test_mistakes_are_one_line(catalog, tmp_path, content, request_, message):
    (tmp_path / "x.txt").write_text("a\nb\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "x.pdf").write_text("a\n")
    (tmp_path / "x.csv").write_text("name\na\n")
    subset(tmp_path / "x.npy", [1])
    np.save(tmp_path / "flat.npy", np.arange(5))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-3])
    with pytest.raises(UserError, match=message):
        filter_samples(catalog, FilterRequest(only=tmp_path / content, **request_))
    with pytest.raises(UserError, match="`refill` does nothing with `exclude`"):
        FilterRequest(exclude=tmp_path / "x.txt", refill="random")
    with pytest.raises(UserError, match=r"`only` does nothing|give one of"):
        FilterRequest("width", only=tmp_path / "x.txt")


def test_the_commands_print_both_shares(catalog, tmp_path):
    (tmp_path / "urls.csv").write_text("\n".join(["url", *URLS[20:40], URLS[20], "https://gone"]))

    def run(*words):
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0
        return " ".join(result.stdout.split())

    told = run("filter", catalog.folder, "--only", tmp_path / "urls.csv", "--dry-run")
    assert "20 of 21 names in" in told and "(95.2%) belong to samples, by url" in told
    assert "these are 20 of 200 samples of the pool (10.0%)" in told and "would drop 180 of 200 samples" in told
    words = ["filter", catalog.folder, "--only", tmp_path / "urls.csv", "--refill", "width", "--strict", "0.9"]
    assert " ".join(["next: tailwise", *map(str, words)]) in run(*words, "--dry-run")
    (tmp_path / "scores.csv").write_text("\n".join(["key,q", *(f"{row:03d},{row}" for row in range(ROWS))]))
    words = ["filter", catalog.folder, "--by", "q", "--file", tmp_path / "scores.csv"]
    assert " ".join(["next: tailwise", *map(str, words), "--keep 0.5"]) in run(*words, "--dry-run")
    told = run("filter", catalog.folder, "--not", tmp_path / "urls.csv", "--name", "gone")
    assert "1 entries repeat a name" in told and "drop list 'gone': drops 20 of 200 samples; 180 stay" in told
    told = run("plan", catalog.folder, "p", "--rates", subset(tmp_path / "s.npy", [1, 2]))
    assert "2 of 2 names of the file (100.0%) belong to samples, by uid; these are 2 of 200 samples of the pool" in told


def test_refills_of_another_kind_are_told_apart(catalog, tmp_path):
    subset(tmp_path / "s.npy", [1, 2])
    filter_samples(catalog, FilterRequest(only=tmp_path / "s.npy", refill="random"))
    with pytest.raises(UserError, match=r"other settings \(`refill` random, 0 → random, 1\)"):
        filter_samples(catalog, FilterRequest(only=tmp_path / "s.npy", refill="random", seed=1))


def test_an_import_without_hashes_is_named_as_the_reason(tmp_path, make_pool):
    make_pool(tmp_path / "tars", [3])
    made = import_pool(tmp_path / "tars", tmp_path / "catalog", workers=1).catalog
    (tmp_path / "x.txt").write_text(MD5[0])
    with pytest.raises(UserError, match="the import found no md5 beside the samples; give"):
        filter_samples(made, FilterRequest(only=tmp_path / "x.txt", match="md5"))


def test_scores_of_files_that_an_older_version_made_are_used(catalog, tmp_path):
    (tmp_path / "s.csv").write_text("\n".join(["key,s", *(f"{row:03d},{row}" for row in range(ROWS))]))
    request = PlanRequest("top-score", score="s", score_file=tmp_path / "s.csv", keep=0.1)
    before = make_plan(catalog, "p", request).draw(0)
    (manifest,) = catalog.folder.glob("scores/*/manifest.json")
    made = read_record(manifest)
    write_record(
        manifest, {**made, "summary": {"keys": ROWS, "keys_without_sample": 0, "samples": ROWS, "scored": ROWS}}
    )
    assert (make_plan(catalog, "again", request).draw(0) == before).all()


def test_why_shows_no_hash_as_a_score(catalog):
    found = json.loads(CliRunner().invoke(app, ["why", str(catalog.folder), "003", "--json"]).stdout)
    assert found["samples"][0]["key"] == "003" and found["samples"][0]["scores"] == {}


# --- removals ----------------------------------------------------------------------------------------------------------


def test_urls_and_hashes_are_removed_now_and_in_later_imports(catalog, source, tmp_path, make_tar, make_image):
    lines = [URLS[3], SHA256[20], "https://later", "020", UIDS[30]]
    (tmp_path / "gone.txt").write_text("\n".join(lines))
    report = remove(catalog, tmp_path / "gone.txt")
    assert report.removed == 4 and report.unknown == [
        "https://later"
    ]  # two samples have the first url, one is named twice
    pq.write_table(pa.table({"md5": [MD5[50].upper(), MD5[51]]}), tmp_path / "md5.parquet")
    assert remove(catalog, tmp_path / "md5.parquet").removed == 2
    (tmp_path / "md5.txt").write_text(MD5[52])
    assert remove(catalog, tmp_path / "md5.txt").unknown == [MD5[52]]  # as a key or uid
    assert remove(catalog, tmp_path / "md5.txt", match="md5").removed == 1
    about = json.dumps({"url": "https://later"}).encode()
    make_tar(tmp_path / "new" / "00009.tar", [("x.jpg", make_image()), ("x.txt", b"c"), ("x.json", about)])
    import_pool(tmp_path / "new", catalog.folder, workers=1)
    named = make_plan(catalog, "named", PlanRequest(rates=subset(tmp_path / "s.npy", [1, 3, 4]))).summary
    assert (named["names_matched"], named["samples_matched"], named["eligible"]) == (3, 2, 2)  # row 3 is removed
    plan = make_plan(catalog, "all", PlanRequest("random", keep=1.0))
    assert np.flatnonzero(plan.draw(0) == 0).tolist() == [3, 20, 30, 50, 51, 52, 193, 200]
    (tmp_path / "capitals.csv").write_text(f"SHA256,x\n{SHA256[60].upper()},1\n")
    assert remove(catalog, tmp_path / "capitals.csv").removed == 1
    (tmp_path / "bad.csv").write_text("sha256\nabc\n")
    with pytest.raises(UserError, match="the sha256 'abc' is none: give 64 hexadecimal digits"):
        remove(catalog, tmp_path / "bad.csv")


def test_a_catalog_of_an_older_version_says_that_it_kept_no_urls(catalog, tmp_path):
    from tailwise.catalog import layout

    for part in catalog.parts():
        marker = layout.marker(catalog.samples_path(part.number))
        write_record(marker, {name: value for name, value in read_record(marker).items() if name != "noted"})
    (tmp_path / "gone.txt").write_text(URLS[3])
    with pytest.raises(UserError, match="200 samples were imported by an older version, which kept no url"):
        remove(catalog, tmp_path / "gone.txt")
