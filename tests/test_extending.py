"""A source format and a plan method of someone else, added as CONTRIBUTING.md says: the format by its reader and one row, the method by
its weights and one row. The tests use them from Python and from the command line."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tailwise import Catalog, GroupRequest, Plan, PlanRequest, UserError, group, import_pool, make_plan
from tailwise.catalog.schema import NO_OFFSET, REJECTED_SCHEMA
from tailwise.plan import methods
from tailwise.plan.methods import Method
from tailwise.shards.containers import CONTAINERS, Container, no_bytes
from tailwise.shards.content import ShardContent, samples_without_bytes
from tailwise.shards.grouping import rejection
from tailwise.sources import SOURCES, find, format_of
from tailwise.storage.delimited import read_rows

# --- a format: tables of paths and captions ----------------------------------------------------------------------------


def read_tsv(path):
    """A sample for each row with a caption: the path is its key."""
    rows = [fields for _, fields in read_rows(path)][1:]
    good = [row for row in rows if row[1]]
    columns = {name: pa.array([row[at] for row in good], pa.string()) for at, name in enumerate(("key", "caption"))}
    rejected = [rejection(path, "no caption", key) for key, caption in rows if not caption]
    content = "\n".join(map("\t".join, good)).encode()
    return ShardContent(
        samples_without_bytes(columns, {}),
        pa.Table.from_pylist(rejected, REJECTED_SCHEMA),
        Path(path).stat().st_size,
        hashlib.blake2b(content, digest_size=16).hexdigest(),
    )


def refuse(path, *_):
    raise no_bytes([path], read_tsv(path).samples.num_rows)


TSV = Container(".tsv", False, read_tsv, refuse, refuse, "reading tables", "path and caption")


@pytest.fixture
def tsv_format(monkeypatch):
    """The row that a contributor adds, for one test."""
    monkeypatch.setitem(CONTAINERS, "tsv", TSV)
    monkeypatch.setitem(SOURCES, "tsv", format_of(TSV))


@pytest.fixture
def tables(tmp_path):
    """A folder of two tables with 5 and 4 samples, and a row without a caption."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for number, rows in enumerate((5, 4)):
        lines = [f"images/{number}{row}.jpg\ta photo of {row}" for row in range(rows)]
        (folder / f"{number}.tsv").write_text("\n".join(["path\tcaption", *lines, *["images/none.jpg\t"] * number]))
    return folder


def keys_of(catalog):
    return [key for part in catalog.parts() for key in catalog.samples(part, ["key"]).column(0).to_pylist()]


KEYS = [f"images/{number}{row}.jpg" for number, rows in enumerate((5, 4)) for row in range(rows)]


def test_without_its_row_the_format_is_unknown(tables):
    with pytest.raises(UserError, match="unknown format 'tsv'"):
        find([str(tables)], "tsv")
    with pytest.raises(UserError, match="nothing to import"):
        find([str(tables)])


@pytest.mark.usefixtures("tsv_format")
@pytest.mark.parametrize("name", ["auto", "tsv"])
@pytest.mark.parametrize("source", ["tables", "tables/*.tsv", "tables/{0,1}.tsv"])
def test_the_format_is_imported_by_name_and_without_it(tables, source, name):
    report = import_pool([str(tables.parent / source)], tables.parent / "pool", format_name=name, workers=1)
    assert (report.new_shards, report.new_samples, report.rejections.counts) == (2, 9, {("import", "no caption"): 1})
    assert keys_of(report.catalog) == KEYS
    samples = report.catalog.samples(report.catalog.parts()[0])
    assert samples.column("caption").to_pylist()[:2] == ["a photo of 0", "a photo of 1"]
    assert {*samples.column("image_offset").to_pylist()} == {NO_OFFSET}
    assert len({*samples.column("uid").to_pylist()}) == 9
    again = import_pool([str(tables)], tables.parent / "pool", workers=1)
    assert (again.new_shards, again.new_samples) == (0, 0)


@pytest.mark.usefixtures("tsv_format")
def test_the_format_works_on_the_command_line(tables, tmp_path, run_tailwise):
    pool = tmp_path / "pool"
    told = run_tailwise("import", tables, pool, "--format", "tsv", "--workers", 1)
    assert "imported 9 samples in 2 shards" in told.stdout
    run_tailwise("plan", pool, "some", "--method", "random", "--keep", 0.34, "--static")
    drawn = Plan(Catalog.open(pool), "some").draw(0)
    assert int(drawn.sum()) == 3
    refused = run_tailwise("embed", pool, "--encoder", "pixels", code=2)
    assert "9 samples in 2 file(s) of metadata have no images" in refused.stderr
    unknown = run_tailwise("import", tables, pool, "--format", "csv", code=2)
    assert "unknown format 'csv'" in unknown.stderr and "tsv" in unknown.stderr


# --- a method: its weights with an option, and a row -------------------------------------------------------------------


def rooted(clusters, *, degree):
    """Return the `degree`-th root of the sizes."""
    return clusters.size ** (1.0 / degree)


ROOTED = Method("in proportion to a root of the cluster size", "a contributor", rooted, options={"degree": 2.0})


@pytest.fixture
def rooted_method(monkeypatch):
    """The row that a contributor adds, for one test."""
    monkeypatch.setitem(methods._METHODS, "rooted", ROOTED)


@pytest.fixture
def grouped(small_catalog):
    """A catalog with a grouping by shard: 260, 200 and 140 samples."""
    group(small_catalog, GroupRequest("shard", name="main"))
    return small_catalog


SIZES = np.array([260, 200, 140])


def counts_of(plan):
    return np.bincount(np.repeat(np.arange(3), SIZES), plan.draw(0)).astype(int).tolist()


def test_without_its_row_the_method_is_unknown(grouped):
    with pytest.raises(UserError, match="unknown method 'rooted'"):
        make_plan(grouped, "p", PlanRequest("rooted", keep=0.5))


@pytest.mark.usefixtures("rooted_method")
@pytest.mark.parametrize("degree", [1.0, 2.0, 3.0])
def test_the_method_weighs_by_its_option(grouped, degree):
    given = {} if degree == 2.0 else {"degree": degree}  # 2 is the default
    plan = make_plan(grouped, "p", PlanRequest("rooted", budget=60, options=given))
    weights = SIZES ** (1 / degree)
    np.testing.assert_allclose(counts_of(plan), 60 * weights / weights.sum(), atol=1)
    assert plan.config["options"] == {"degree": degree}


@pytest.mark.usefixtures("rooted_method")
def test_the_method_works_on_the_command_line(grouped, run_tailwise):
    run_tailwise("plan", grouped.folder, "p", "--method", "rooted", "--budget", 60, "--option", "degree=3")
    expected = make_plan(grouped, "q", PlanRequest("rooted", budget=60, options={"degree": 3.0}))
    assert counts_of(Plan(grouped, "p")) == counts_of(expected)
    words = ("--keep", 0.5, "--option", "degree=3")
    refused = run_tailwise("plan", grouped.folder, "r", "--method", "flat", *words, code=2)
    assert "`degree` does nothing with method 'flat'; it belongs to rooted" in refused.stderr
    unknown = run_tailwise("plan", grouped.folder, "r", "--method", "roted", *words, code=2)
    assert "rooted" in unknown.stderr
