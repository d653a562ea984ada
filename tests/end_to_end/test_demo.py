"""The demo: from a drawn pool to the table of two trainings."""

import json

import numpy as np
import pytest

from tailwise.catalog import Catalog
from tailwise.catalog.drops import DropList
from tailwise.cli.demo import demo_commands
from tailwise.demo.run import run
from tailwise.errors import UserError
from tailwise.printing import print_demo
from tailwise.progress import silent

SHORT = ("train.samples_seen=256", "train.warmup=1", "seeds=[0]", "evaluate.bootstrap=1")


def table(path):
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]


def test_the_demo_tells_a_whole_comparison_and_a_repeated_one_trains_nothing(tmp_path, capsys):
    pytest.importorskip("open_clip_train.main", reason="open_clip's trainer isn't installed")
    folder, told = tmp_path / "demo", []
    result = run(folder, 1000, demo_commands, told.append, silent, SHORT, tested=2)

    catalog = Catalog.open(folder / "catalog")
    assert catalog.snapshot().rows == 1125
    keys = [key for part in catalog.parts() for key in catalog.samples(part, ["key"]).column(0).to_pylist()]
    source = dict(table(folder / "pool" / "duplicates.tsv"))
    dropped = DropList(catalog, "duplicates").mask
    kept = {source.get(key, key) for key, gone in zip(keys, dropped, strict=True) if not gone}
    copies = dropped.sum() - (1000 - len(kept))
    assert (
        f"  {dropped.sum()} dropped: {copies} of the 125 near-duplicates, and {1000 - len(kept)} drawings"
        in "\n".join(told)
    )
    assert copies > 3 * (1000 - len(kept))
    assert [line.split()[2] for line in told if line.startswith("$")] == [
        *("import", "embed", "cluster", "dedup", "cluster", "plan", "plan", "compare"),
    ]  # fmt: skip

    counts = np.array([int(count) for _, count in table(folder / "counts.tsv")])
    truth = {key: int(concept) for key, concept, _ in table(folder / "pool" / "concepts.tsv")}
    assert counts.sum() == 1000
    assert [group.concepts for group in result.groups.values()] == [86, 85, 85]
    head = np.isin([truth[key] for key in keys], np.argsort(-counts, kind="stable")[:86])
    assert result.groups["head"].pool == pytest.approx(head.mean())
    for row in ("random", "planned"):
        assert sum(group.drawn[row] for group in result.groups.values()) == pytest.approx(1)
    assert result.groups["head"].drawn["planned"] < result.groups["head"].drawn["random"] - 0.05
    assert result.groups["few"].drawn["planned"] > result.groups["few"].drawn["random"] + 0.02

    print_demo(result)
    shown = capsys.readouterr().out
    trained = json.loads((folder / "comparison" / "runs" / "planned" / "seed-0" / "result.json").read_text())
    found = trained["evaluations"][0]
    right = [*(found["groups"][name]["accuracy"]["value"] for name in result.groups), found["top1"]["value"]]
    cells = [cell.strip() for cell in shown.split("accuracy, planned")[1].split("\n")[0].split("│")]
    assert cells[1:5] == [f"{100 * value:.1f}" for value in right]
    assert "one seed, 256 samples seen" in shown
    assert "few: One seed only, so nothing can be said: planned (" in shown

    told.clear()
    assert run(folder, 1000, demo_commands, told.append, silent, SHORT, tested=2) == result
    assert sum("done already" in line for line in told) == 2
    with pytest.raises(UserError, match="a demo of 1,000 images, not 2,000"):
        run(folder, 2000, demo_commands, told.append, silent)


def test_a_folder_of_the_users_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(UserError, match="exists and is no demo"):
        run(tmp_path, 1000, demo_commands, print, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_demo_of_an_older_version_is_refused(tmp_path):
    (tmp_path / "pool.json").write_text('{"images": 1000}')
    with pytest.raises(UserError, match="the demo of an older version: name another folder"):
        run(tmp_path, 1000, demo_commands, print, silent)
