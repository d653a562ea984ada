"""Epochs that are counted before the training."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tailwise.cli import app
from tailwise.errors import UserError
from tailwise.loader import sections
from tailwise.loader.loader import Loader
from tailwise.loader.sections import prepare_epochs, units_of
from tailwise.plan import Plan
from tailwise.requests import PlanRequest
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan


@pytest.fixture
def plan(own_pool):
    return make_plan(own_pool, "epochs", PlanRequest("flat", keep=0.5))


def test_prepared_epochs_are_those_that_a_training_counts(plan, own_pool, monkeypatch, tree_bytes):
    expected = [units_of(plan, epoch, keep=False).tobytes() for epoch in range(4)]
    given = [str(own_pool.folder), "epochs", "--first", "1", "--epochs", "3"]
    done = CliRunner().invoke(app, ["prepare", *given])
    assert done.exit_code == 0
    assert "epochs 1 … 3 are counted, and all samples located" in done.output
    before = tree_bytes(own_pool.folder)
    assert "slots" in " ".join(map(str, before))
    assert CliRunner().invoke(app, ["prepare", *given]).exit_code == 0
    assert tree_bytes(own_pool.folder) == before
    monkeypatch.setattr(sections, "_count", None)  # nothing is counted from here on
    assert [units_of(Plan(own_pool, "epochs"), epoch).tobytes() for epoch in (1, 2, 3)] == expected[1:]
    loader = Loader(Plan(own_pool, "epochs"), batch_size=50, first_epoch=1)
    assert len(list(loader.epoch(1))) == loader.batches_until(2) == 10
    loader.close()


def test_slots_are_kept_of_the_first_and_the_last_two_epochs(plan, own_pool):
    prepare_epochs(plan, range(1, 7))
    folders = {path.name.partition("-")[2][:9] for path in (plan.folder / "slots").glob("before-*.npy")}
    assert sorted(map(int, folders)) == [1, 5, 6]


def test_a_plan_of_samples_without_bytes_is_refused(tmp_path):
    uids = [f"{number:032x}" for number in range(8)]
    (tmp_path / "metadata").mkdir()
    pq.write_table(
        pa.table({"uid": uids, "text": [f"thing {uid}" for uid in uids]}), tmp_path / "metadata" / "a.parquet"
    )
    catalog = import_pool([str(tmp_path / "metadata")], tmp_path / "catalog").catalog
    make_plan(catalog, "epochs", PlanRequest("random", keep=0.5))
    done = CliRunner().invoke(app, ["prepare", str(catalog.folder), "epochs"])
    assert isinstance(done.exception, UserError)
    assert not (catalog.folder / "locations").exists()


@pytest.mark.parametrize("epochs", [range(0), range(-1, 2), range(9_999, 10_002)])
def test_epochs_out_of_bounds_are_refused(plan, epochs):
    with pytest.raises(UserError, match="must lie between 0 and 10,000"):
        prepare_epochs(plan, epochs)
