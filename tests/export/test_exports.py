import hashlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tailwise.catalog.files import file_stamp
from tailwise.cli import app
from tailwise.context import Context
from tailwise.errors import ConflictError, UserError
from tailwise.export import EXPORTS, export, files
from tailwise.export.files import write_datacomp
from tailwise.requests import ClusterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan


@pytest.fixture
def repeating(small_catalog):
    """A plan with 0, 1, 2 and 3 copies of samples."""
    cluster(small_catalog, ClusterRequest(k=12))
    return make_plan(small_catalog, "p", PlanRequest("flat", keep=0.8, max_repeats=3))


def write_hashed(plan, epoch, path):
    """As the export to datacomp, of uids that are hashes of ours too: the file's bytes, without that check; the number of copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_given_uids", lambda epoch, part: epoch.part(part, ["uid"]))
        return write_datacomp(plan, epoch, path, Context())


def samples(plan, column):
    return [value for part in plan.catalog.parts() for value in plan.catalog.samples(part, [column])[0].to_pylist()]


def test_datacomp_holds_each_uid_as_often_as_it_is_drawn_in_sorted_order(repeating, tmp_path):
    written = write_hashed(repeating, 2, tmp_path / "s.npy")
    array = np.load(tmp_path / "s.npy", allow_pickle=False)
    assert array.dtype == np.dtype("u8,u8")
    assert array.ndim == 1
    pairs = [(int(high), int(low)) for high, low in array]
    assert pairs == sorted(pairs)
    expected = []
    for uid, copies in zip(samples(repeating, "uid"), repeating.draw(2), strict=True):
        text = uid.hex()
        expected += [(int(text[:16], 16), int(text[16:], 16))] * int(copies)
    assert pairs == sorted(expected)
    assert written == len(pairs) == 480


def test_rates_json_names_every_sample_and_its_rate(repeating, tmp_path):
    export(repeating, "rates-json", tmp_path / "r.json")
    rates = json.loads((tmp_path / "r.json").read_text())
    assert list(rates) == samples(repeating, "key")
    assert list(rates.values()) == repeating.rate(slice(0, 600)).tolist()


def test_the_command_warns_of_rates_above_1(repeating, tmp_path):
    """Their trainer keeps a sample if a number below 1 is below its rate: once at most."""
    words = ["export", str(repeating.catalog.folder), "p", str(tmp_path / "r.json"), "--to", "rates-json"]
    told = CliRunner().invoke(app, words).output
    rates = repeating.rate(slice(0, 600))
    above, short = int((rates > 1).sum()), 1 - np.minimum(rates, 1).sum() / rates.sum()
    assert above
    assert (
        f"warning: {above:,} samples have a rate above 1, and the authors' trainer draws a sample once at most" in told
    )
    assert f"it will draw {short:.1%} too few samples (plan with --max-repeats 1 for it)" in told
    make_plan(repeating.catalog, "once", PlanRequest("flat", keep=0.4))
    words[2], words[3] = "once", str(tmp_path / "once.json")
    assert "rate above 1" not in CliRunner().invoke(app, words).output


def test_rates_json_of_a_subset_names_the_dropped_ones_with_rate_0(small_catalog, tmp_path):
    cluster(small_catalog, ClusterRequest(k=12))
    plan = make_plan(small_catalog, "p", PlanRequest("dbp", keep=0.25))
    export(plan, "rates-json", tmp_path / "r.json")
    rates = np.array(list(json.loads((tmp_path / "r.json").read_text()).values()))
    assert np.array_equal(rates, plan.draw(0))
    assert (rates == 0).sum() == 450


def test_keys_come_one_a_line_one_line_a_copy(repeating, tmp_path):
    export(repeating, "keys", tmp_path / "k.txt", epoch=1)
    keys = samples(repeating, "key")
    expected = [key for key, copies in zip(keys, repeating.draw(1), strict=True) for _ in range(copies)]
    assert (tmp_path / "k.txt").read_text().splitlines() == expected


def test_parquet_says_shard_key_uid_cluster_rate_and_copies(repeating, tmp_path):
    export(repeating, "parquet", tmp_path / "d.parquet", epoch=1)
    table = pq.read_table(tmp_path / "d.parquet")
    copies = repeating.draw(1)
    rows = np.flatnonzero(copies)
    assert table["copies"].to_pylist() == copies[rows].tolist()
    assert table["key"].to_pylist() == [samples(repeating, "key")[row] for row in rows]
    assert table["uid"].to_pylist() == [samples(repeating, "uid")[row].hex() for row in rows]
    assert table["cluster"].to_pylist() == repeating.groups[rows].tolist()
    assert table["rate"].to_pylist() == repeating.rate(rows).tolist()
    assert table["shard_id"].to_pylist() == np.array(samples(repeating, "shard"))[rows].tolist()
    paths = repeating.catalog.shards()["path"].to_pylist()
    assert table["shard"].to_pylist() == [paths[shard] for shard in np.array(samples(repeating, "shard"))[rows]]


@pytest.mark.parametrize("name", sorted({*EXPORTS} - {"shards", "datacomp", "urls", "plan-bundle"}))
def test_every_export_is_repeatable_and_refuses_to_overwrite(repeating, tmp_path, name, caplog):
    caplog.set_level("INFO")
    first = export(repeating, name, tmp_path / "a", epoch=0)
    export(repeating, name, tmp_path / "b", epoch=0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "done already" not in caplog.text
    before = file_stamp(tmp_path / "a")
    assert export(repeating, name, tmp_path / "a", epoch=0) == first
    assert file_stamp(tmp_path / "a") == before
    assert f"{tmp_path / 'a'}: done already" in caplog.text
    other = make_plan(repeating.catalog, "other", PlanRequest("flat", keep=0.4))
    with pytest.raises(ConflictError, match="exists: name another file"):
        export(other, name, tmp_path / "a", epoch=0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    export(repeating, name, tmp_path / "a", epoch=1, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a", "b"]


def test_where_a_file_cannot_go(repeating, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is no regular file"):
        export(repeating, "keys", tmp_path / "link", epoch=0, overwrite=True)
    with pytest.raises(UserError, match="is in the catalog"):
        export(repeating, "keys", repeating.catalog.folder / "shards.parquet", epoch=0, overwrite=True)
    assert (tmp_path / "mine").read_text() == "mine"
    with pytest.raises(UserError, match="is a folder"):
        export(repeating, "keys", tmp_path, epoch=0)
    with pytest.raises(UserError, match="doesn't exist: make it first"):
        export(repeating, "keys", tmp_path / "no" / "k.txt", epoch=0)
    with pytest.raises(UserError, match="unknown export 'csv': use datacomp, rates-json, keys, parquet"):
        export(repeating, "csv", tmp_path / "k.csv")
    with pytest.raises(UserError, match="epoch -1: must lie between 0 and 10,000"):
        export(repeating, "keys", tmp_path / "k.txt", epoch=-1)


@pytest.mark.parametrize("name", ["keys", "rates-json"])
def test_formats_that_know_keys_only_refuse_clashing_keys(tmp_path, make_tar, make_image, name):
    for shard in ("a", "b"):
        make_tar(tmp_path / shard / "00000.tar", [("k.jpg", make_image()), ("k.txt", b"c")])
    catalog = import_pool([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "catalog", workers=1).catalog
    plan = make_plan(catalog, "p", PlanRequest("random", keep=1.0))
    with pytest.raises(UserError, match="2 samples share their key"):
        export(plan, name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(plan, "parquet", tmp_path / "out") == 2


def test_golden_bytes(small_catalog, tmp_path):
    """A release that changes anybody's epoch, or a file's bytes, must say so by changing these."""
    digests = {}
    for draw in ("stream", "bernoulli"):
        plan = make_plan(small_catalog, draw, PlanRequest("random", keep=0.3, draw=draw, seed=7))
        for name in ("datacomp", "rates-json", "keys"):
            write = (
                write_hashed
                if name == "datacomp"
                else lambda plan, epoch, path, name=name: export(plan, name, path, epoch=epoch)
            )
            write(plan, 5, tmp_path / f"{draw}-{name}")
            content = (tmp_path / f"{draw}-{name}").read_bytes()
            digests[f"{draw} {name}"] = hashlib.sha256(content).hexdigest()[:16]
    assert digests == {
        "stream datacomp": "fc66a4fd6c7bd9eb",
        "stream rates-json": "82ab569b4dfc85fd",
        "stream keys": "d8a1ce2fd472c762",
        "bernoulli datacomp": "316921d0462dabbf",
        "bernoulli rates-json": "82ab569b4dfc85fd",
        "bernoulli keys": "a9072859e897ab9f",
    }
