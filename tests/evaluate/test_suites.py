"""Suites: their table, official metrics against plain loops, and real sets of a folder."""

import io
import json
import shutil

import numpy as np
import pytest

from tailwise.errors import UserError
from tailwise.evaluate import metrics, suites
from tailwise.evaluate.suites import METRICS, find_suite, members


def test_the_table_names_the_sets_of_the_papers():
    found = members()
    assert {name: len(listed) for name, listed in found.items()} == {"datacomp": 37, "shifts": 7, "vtab": 19}
    assert {member.metric for listed in found.values() for member in listed} == set(METRICS)
    sizes = {}
    for name in (name for listed in found.values() for member in dict.fromkeys(listed) for name in member.averages):
        sizes[name] = sizes.get(name, 0) + 1
    assert len({member.title for listed in found.values() for member in listed}) == 43
    listed = {member.title: member for members_ in found.values() for member in members_}.values()
    counts = {name: sum(name in member.averages for member in listed) for name in sizes}
    assert counts == {
        "datacomp": 37,
        "datacomp: ImageNet shifts": 6,
        "datacomp: VTAB": 13,
        "datacomp: retrieval without WinoGAViL": 2,
        "shifts": 6,
        "shifts: ImageNet": 1,
        "vtab": 19,
        "vtab: natural": 7,
        "vtab: specialized": 4,
        "vtab: structured": 8,
    }


@pytest.mark.parametrize("seed", range(3))
def test_macro_f1_and_worst_groups_are_those_of_plain_loops(seed):
    random = np.random.default_rng(seed)
    labels, groups = random.integers(0, 6, 300), random.integers(-1, 4, 300)
    guesses = np.stack([random.permutation(9)[:5] for _ in range(300)])
    guesses[::2, 0] = labels[::2]
    f1 = []
    for c in np.unique(labels):  # WILDS: classes that have images
        right = np.sum((labels == c) & (guesses[:, 0] == c))
        f1.append(2 * right / (np.sum(labels == c) + np.sum(guesses[:, 0] == c)))
    how = {"replicates": 200, "seed": seed}
    found = metrics.macro_f1(labels, guesses, groups, **how)
    assert found["value"] == pytest.approx(np.mean(f1))
    assert found["low"] < found["value"] < found["high"]
    for top in (1, 5):
        right = (guesses[:, :top] == labels[:, None]).any(axis=1)
        worst = min(right[groups == group].mean() for group in range(4))  # a negative group is left out
        found = metrics.worst_group(top)(labels, guesses, groups, **how)
        assert found["value"] == pytest.approx(worst)
        assert found["low"] < found["high"]
    none = metrics.worst_group(1)(labels, guesses, np.full(300, -1), **how)
    assert set(none.values()) == {None}


def npy(*values):
    stream = io.BytesIO()
    np.save(stream, np.array(values))
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path, make_classification, make_retrieval, make_tar, make_picture, labels):
    """Three sets of suite datacomp: as clip_benchmark's, as DataComp's with groups, and a retrieval set."""
    make_classification(tmp_path / "wds_imagenet1k", labels)
    grouped = make_classification(tmp_path / "wds_wilds-fmow_test", labels)
    shutil.rmtree(grouped / "test")
    names = [(f"s{at:05d}", label) for at, label in enumerate(labels)]
    content = {"png": make_picture, "cls": lambda at: str(labels[at]).encode()}
    content["npy"] = lambda at: npy([5, 0, 1][at % 3] if at < 60 else 0, 2017)
    make_tar(
        grouped / "test" / "0.tar",
        [(f"{name}.{kind}", make(at)) for at, (name, _) in enumerate(names) for kind, make in content.items()],
    )
    (grouped / "test" / "nshards.txt").write_text("1")
    make_retrieval(tmp_path / "wds_flickr30k", [[f"text {at}", f"other {at}"] for at in range(12)])
    return tmp_path


def test_a_suite_is_one_table(folder, tiny_checkpoint, tiny_model, run_tailwise, labels):
    command = ["evaluate", tiny_checkpoint, "--model", tiny_model, "--suite", "datacomp", folder, "--workers", "1"]
    told = run_tailwise(*command).stdout
    assert "missing: ImageNet-V2; hf download clip-benchmark/wds_imagenetv2 --repo-type dataset" in told
    assert "djghosh/wds_food101_test --repo-type dataset" in told
    assert "1 of 6 sets" not in told
    found = json.loads(run_tailwise(*command, "--json").stdout)
    rows = {item["set"]: item for item in found["suite"]["sets"]}
    by_name = {item["set"]: item for item in found["sets"]}
    assert {name for name, row in rows.items() if row["missing"] is None} == {"ImageNet", "FMoW", "Flickr30k"}
    assert rows["ImageNet"]["value"] == by_name["ImageNet"]["top1"]["value"]
    assert rows["Flickr30k"]["value"] == by_name["Flickr30k"]["mean_recall"]["1"]["value"]
    assert rows["FMoW"]["metric"] == "worst_group_top1"
    assert rows["FMoW"]["value"] <= by_name["FMoW"]["top1"]["value"]
    averages = found["suite"]["averages"]
    assert averages["datacomp"] == {"sets": 37, "found": 3, "value": None}
    assert averages["retrieval without WinoGAViL"] == {"sets": 2, "found": 1, "value": None}
    shutil.copytree(folder / "wds_flickr30k", folder / "mscoco_captions")
    again = json.loads(run_tailwise(*command, "--json", "--output", folder / "out").stdout)["suite"]
    assert again["averages"]["retrieval without WinoGAViL"]["value"] == pytest.approx(rows["Flickr30k"]["value"])
    assert json.loads((folder / "out" / "summary.json").read_text())["suite"] == again
    told = run_tailwise(*command).stdout
    assert "average, retrieval without WinoGAViL" in told


def test_the_worst_group_leaves_out_the_ignored_one(folder, measure_official, labels):
    values = measure_official(folder, "datacomp")
    guesses, groups = values["guesses"], np.array([[5, 0, 1][at % 3] if at < 60 else 0 for at in range(90)])
    right = guesses == np.array(labels)
    assert values["FMoW"] == pytest.approx(min(right[groups == group].mean() for group in (0, 1)))


@pytest.fixture
def measure_official(tiny_checkpoint, tiny_model):
    from tailwise.context import Context
    from tailwise.encoders.open_clip import find_checkpoint, load_model
    from tailwise.evaluate.run import evaluate
    from tailwise.evaluate.zero_shot import classify
    from tailwise.requests import EvaluateRequest

    def measure(folder, suite):
        options = EvaluateRequest(model=tiny_model, workers=1)
        sets = find_suite(suite, folder)
        made = {item.name: item.summary["official"]["value"] for item in evaluate(tiny_checkpoint, sets, options)}
        (grouped,) = [item for item in sets if item.name == "FMoW"]
        loaded = load_model(find_checkpoint(tiny_checkpoint, tiny_model), "cpu", "fp32")
        _, guesses, _, _ = classify(loaded, grouped, options, Context())
        return {**made, "guesses": guesses[:, 0]}

    return measure


def test_mistakes_are_one_line(folder, tmp_path, tiny_checkpoint, tiny_model, run_tailwise, make_tar, make_picture):
    with pytest.raises(UserError, match="unknown `suite` 'datacom': did you mean 'datacomp'"):
        find_suite("datacom", folder)
    with pytest.raises(
        UserError, match="holds no set of suite vtab, such as Caltech-101 in wds_vtab-caltech101: hf download"
    ):
        find_suite("vtab", folder)
    command = ["evaluate", tiny_checkpoint, "--model", tiny_model, "--suite", "datacomp", folder, "--workers", "1"]
    assert (
        "give the sets with --data, or --suite NAME FOLDER" in run_tailwise("evaluate", tiny_checkpoint, code=2).stderr
    )
    assert "--classes does nothing with --suite" in run_tailwise(*command, "--classes", "x", code=2).stderr
    for content in (b"no npy", npy(-1.0), npy(0.5), npy("text"), npy()):
        members_ = [("a.png", make_picture(0)), ("a.cls", b"0"), ("a.npy", content)]
        make_tar(folder / "wds_wilds-fmow_test" / "test" / "0.tar", members_)
        told = run_tailwise(*command, code=2).stderr
        assert "a .npy holds no group" in told
        assert "Traceback" not in told


def test_every_set_has_a_command_that_gets_it(tmp_path):
    for member in (member for listed in suites.members().values() for member in listed):
        assert member.remedy(tmp_path).startswith(f"hf download {member.publisher}/wds_{member.name}")
