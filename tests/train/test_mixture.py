"""open_clip's upsampling factors become a plan, which is printed and trained on."""

import pytest

from tailwise.catalog import Catalog
from tailwise.demo.pool import make_pool
from tailwise.plan import Plan
from tailwise.requests import PlanRequest
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan


@pytest.fixture
def sources(tmp_path):
    """192 drawings of source "a", in three shards, and 64 of "b"; plan "epochs" takes half of them."""
    make_pool(tmp_path / "made", images=256, concepts=8, shards=4, size_px=32)
    for number in range(4):
        folder = tmp_path / "pool" / ("b" if number == 3 else "a")
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / f"{number:05d}.tar").rename(folder / f"{number}.tar")
    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog
    make_plan(catalog, "epochs", PlanRequest("random", keep=0.5))
    return tmp_path


def test_a_training_with_factors_is_one_on_their_mixture(sources, tiny_model, run_tailwise, read_record):
    words = ["train", sources / "catalog", "epochs", "--samples-seen", "128", "--record", sources / "record"]
    data = f"{sources}/pool/a/{{0..2}}.tar::{sources}/pool/b/3.tar"
    mixed = ["--dataset-resampled", "--train-data", data, "--train-data-upsampling-factors", "1::3"]
    trainer = ["--model", tiny_model, "--device", "cpu", "--precision", "fp32", "--workers", "0", "--batch-size", "16"]
    trainer += ["--logs", sources / "logs", "--report-to", "", "--warmup", "1"]
    shown = run_tailwise(*words, "--dry-run", "--", *trainer, *mixed).stdout
    assert "source a: factor 1, 50.0% of an epoch" in shown and "source b: factor 3, 50.0% of an epoch" in shown
    assert "plan 'epochs-mixture-1-3' isn't made by a dry run" in shown
    assert not (sources / "catalog" / "clusters" / "source").exists()
    shown = run_tailwise(*words, "--", *trainer, *mixed).stdout
    assert f"plan {sources}/catalog epochs-mixture-1-3 --method mixture --of epochs" in shown
    plan = Plan(Catalog.open(sources / "catalog"), "epochs-mixture-1-3")
    assert [plan.draw(0)[:192].sum(), plan.draw(0)[192:].sum()] == [64, 64]
    lines = read_record(sources / "record" / "epochs-mixture-1-3.rank-0.jsonl")
    rows = sorted(row for line in lines for row in line["rows"])
    assert rows == plan.draw(0).nonzero()[0].tolist()  # what was trained on is the plan's epoch 0
