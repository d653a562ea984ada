"""Ledgers of plans whose steps took known seconds."""

import numpy as np
import pytest
import torch

from tailwise.compare.ledger import PHASES, Ledger, ledger_table
from tailwise.requests import (
    ClusterRequest,
    DedupRequest,
    EmbedRequest,
    FilterRequest,
    GroupRequest,
    NamedScoreRequest,
    PlanRequest,
)
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.embedding.embed import embed
from tailwise.steps.grouping.group import group
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.filter import filter_samples
from tailwise.steps.scoring.named import make_named_score

SECONDS = {
    "embeddings/colours": 1000,
    "clusters/main": 200,
    "clusters/by-colour": 100,
    "clusters/group": 30,
    "drops/near": 7,
    "drops/long": 40,
    "named-scores/h": 50,
    "named-scores/m": 5,
    **dict.fromkeys(("plans/p", "plans/q", "plans/of", "plans/r", "plans/s"), 1),
}


@pytest.fixture
def timed(small_catalog, tmp_path):
    """A catalog with plans "p", "q", "r", whose steps took SECONDS; the embeddings are imported."""
    embed(small_catalog, EmbedRequest(encoder="pixels", column="colours", of="image", workers=1))
    cluster(small_catalog, ClusterRequest(k=12))
    cluster(small_catalog, ClusterRequest(k=8, column="colours", name="by-colour"))
    dedup(small_catalog, DedupRequest(epsilon=0.01, name="near"))
    filter_samples(small_catalog, FilterRequest("caption-characters", minimum=1, name="long"))
    (tmp_path / "groups.csv").write_text("key,kind\n" + "".join(f"{row:06d},{row % 3}\n" for row in range(600)))
    group(small_catalog, GroupRequest(by="kind", file=tmp_path / "groups.csv", name="group"))
    torch.save({"weight": torch.ones(1, 16)}, tmp_path / "head.pth")
    np.save(tmp_path / "target.npy", np.ones((1, 16), np.float32))
    make_named_score(small_catalog, NamedScoreRequest(name="h", head=tmp_path / "head.pth"))
    make_named_score(
        small_catalog, NamedScoreRequest(name="m", mix="z(h) + z(normsim)", target=tmp_path / "target.npy")
    )
    make_plan(small_catalog, "s", PlanRequest("top-score", keep=0.5, score="m"))
    make_plan(small_catalog, "p", PlanRequest("dynamics", keep=0.5, without=("near", "long")))
    make_plan(small_catalog, "q", PlanRequest("flat", keep=0.3, clustering="by-colour"))
    make_plan(small_catalog, "of", PlanRequest("random", keep=0.3))
    make_plan(small_catalog, "r", PlanRequest("between", of="of", clustering="group"))
    return small_catalog


def run(plan, seconds):
    return {"plan": {"name": plan}, "trained": {"seconds": seconds}}


def test_the_whole_cost_of_each_step_that_a_plan_rests_on(timed):
    ledger = Ledger(timed, SECONDS)
    found = ledger.of([run("p", 10), run("p", 30)])
    assert found["seconds"] == {
        "embedding": 0, "scoring": 40, "clustering": 200, "lists and plan": 7 + 1, "training": 20,
    }  # fmt: skip
    assert found["unknown"] == ["embedding"]
    kinds = {name.partition("/")[0] for name in found["steps"]}
    assert kinds == {"plans", "drops", "clusters", "embeddings"}
    assert found["models"] == ["not noted (imported embeddings: image)"]
    colours = ledger.of([run("q", 10)])
    assert colours["seconds"] == {
        "embedding": 1000,
        "scoring": 0,
        "clustering": 100,
        "lists and plan": 1,
        "training": 10,
    }
    assert (colours["models"], colours["unknown"]) == ([], [])  # pixels are no model
    apart = ledger.of([run("r", 10)])
    assert apart["seconds"] == {"embedding": 0, "scoring": 0, "clustering": 30, "lists and plan": 2, "training": 10}
    assert apart["models"] == ["not noted (a table: group)"]
    scored = ledger.of([run("s", 10)])
    assert scored["seconds"] == {
        "embedding": 0,
        "scoring": 50 + 5,
        "clustering": 0,
        "lists and plan": 1,
        "training": 10,
    }
    assert scored["models"] == [
        "not noted (a file of target embeddings: m)",
        "not noted (imported embeddings: image)",
        "not noted (weights of a head: h)",
    ]
    mixed = ledger.of([run("p", 10), run("q", 10)])  # as with a clustering for each seed: means over runs
    assert mixed["seconds"]["clustering"] == 150
    assert ledger.of([]) is None
    assert ledger.of([run("gone", 1)]) is None


def test_the_table_names_shared_steps_and_those_without_a_time(timed):
    ledger = Ledger(timed, SECONDS)
    rows = [
        {"row": "P", "ledger": ledger.of([run("p", 3600)])},
        {"row": "P again", "ledger": ledger.of([run("p", 360)])},
    ]
    rows += [{"row": "Q", "ledger": ledger.of([run("q", 0)])}, {"row": "not done", "ledger": None}]
    table = ledger_table(rows)
    assert table["columns"] == ["row", *PHASES, "outside models"]
    model = "not noted (imported embeddings: image)"
    assert table["cells"] == [
        ["P", "?", "0.011", "0.056", "0.002", "1.000", model],
        ["P again", "?", "0.011", "0.056", "0.002", "0.100", model],
        ["Q", "0.278", "0", "0.028", "< 0.001", "0", "none"],
    ]
    shared, unknown = table["notes"]
    assert "clusters/main (2 rows)" in shared and "by-colour" not in shared
    assert "embeddings/image" in unknown and "clusters" not in unknown


def test_named_scores_are_scoring_and_their_files_are_made_elsewhere(small_catalog, tmp_path):
    (tmp_path / "quality.csv").write_text("key,quality\n" + "".join(f"{row:06d},{row % 7}\n" for row in range(600)))
    make_named_score(small_catalog, NamedScoreRequest(name="quality", file=tmp_path / "quality.csv"))
    make_named_score(small_catalog, NamedScoreRequest(name="mixed", mix="z(quality) + 0.1*z(caption-characters)"))
    filter_samples(small_catalog, FilterRequest("mixed", keep=0.5, name="best"))
    make_plan(small_catalog, "p", PlanRequest("random", keep=0.3, without=("best",)))
    seconds = {"named-scores/quality": 100, "named-scores/mixed": 20, "drops/best": 3, "plans/p": 1}
    found = Ledger(small_catalog, seconds).of([run("p", 10)])
    assert found["steps"] == seconds
    assert found["seconds"] | {"scoring": 123, "lists and plan": 1} == found["seconds"]
    assert found["models"] == ["not noted (a table: quality)"]
