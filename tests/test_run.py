"""`tailwise run`: a pool from import to exports in one command."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from tailwise.catalog import Catalog
from tailwise.catalog.files import write_json
from tailwise.cli import app
from tailwise.cli.run import step_commands
from tailwise.errors import UserError
from tailwise.pipeline.run import Runner
from tailwise.pipeline.steps import FOLDER, STEPS, Step, load_pipeline, with_settings
from tailwise.plan.plan import Plan
from tailwise.requests import NamedScoreRequest
from tailwise.steps.scoring.named import make_named_score

RECIPE = {
    "name": "mine",
    "about": "a test",
    "steps": [
        {"import": None},
        {"cluster": {"name": "fine", "clusters": 20}},
        {"dedup": {"clusters-name": "fine", "epsilon": 0.2}},
        {"filter": {"by": "caption-characters", "max": 7, "without": ["duplicates"], "name": "large"}},
        {"cluster": {"clusters": 6, "without": "large"}},
        {"plan": {"name": "epochs", "method": "dynamics", "budget": 5, "dynamic": True}},
        {"export": {"name": "epochs", "to": "parquet", "epoch": 0, "output": "subset.parquet"}},
        {"removed": {"plan": "epochs", "output": "removed.parquet"}},
    ],
}


def runner(catalog=Path("cat"), sources=("tars",), output=Path("out"), **options):
    return Runner(step_commands(), catalog, sources, output, **options)


def check(steps, catalog):
    made = runner(catalog)
    made.check([made.job(step) for step in steps])


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


def uids_of(path):
    return pq.read_table(path).column("uid").to_pylist()


def test_a_pool_goes_from_import_to_exports_and_a_rerun_goes_on(run_tailwise, recipe, _small_catalog_source, tmp_path):
    catalog, out = tmp_path / "catalog", tmp_path / "out"
    sources = [_small_catalog_source / "pool", _small_catalog_source / "embeddings"]
    arguments = ["run", recipe, *sources, catalog, "--output", out]
    planned = run_tailwise(*arguments, "--dry-run")
    assert "3 shards, about 60" in planned.stdout
    assert not catalog.exists()
    assert not out.exists()
    run_tailwise(*arguments)
    opened = Catalog.open(catalog)
    plan = Plan(opened, "epochs")
    uids = uids_of(out / "subset.parquet")
    assert len(uids) == plan.draw(0).sum() > 0
    never = pq.read_table(out / "removed.parquet")
    assert never.num_rows == 600 - np.count_nonzero(plan.rate(slice(0, 600)))
    assert set(never.column("stage").to_pylist()) == {"dedup", "filter"}
    before = (out / "subset.parquet").stat().st_mtime_ns
    (out / "removed.parquet").unlink()  # as if the run had been interrupted before the last step
    again = run_tailwise(*arguments)
    assert again.stdout.count("done already") == 1
    assert (out / "subset.parquet").stat().st_mtime_ns == before
    assert pq.read_table(out / "removed.parquet").equals(never)
    assert run_tailwise(*arguments, "--dry-run").stdout.count(" is there ") == len(RECIPE["steps"])
    for record in (catalog / "exports").glob("*.json"):  # as if it had been interrupted between an export and its note
        write_json(record, {**json.loads(record.read_text()), "files": None})
    again = run_tailwise(*arguments, "--workers", 1)
    assert "done already" not in again.stdout
    assert uids_of(out / "subset.parquet") == uids
    drawn = plan.draw(0)
    (part, *_) = opened.parts()
    key = opened.samples(part, ["key"]).column(0).to_pylist()[int(np.flatnonzero(drawn)[0])]
    (tmp_path / "gone.txt").write_text(key)
    run_tailwise("remove", catalog, "--keys", tmp_path / "gone.txt")
    run_tailwise(*arguments)
    assert len(uids_of(out / "subset.parquet")) == len(uids) - 1
    assert pq.read_table(out / "removed.parquet").num_rows == never.num_rows + 1
    (out / "subset.parquet").write_bytes(b"mine")
    planned = run_tailwise(*arguments, "--dry-run").stdout
    assert planned.count(" is there ") == len(RECIPE["steps"]) - 1
    assert (
        f"refused: it exists with other contents ({out / 'subset.parquet'}: give another output, or delete it)"
        in planned
    )
    refused = run_tailwise(*arguments, code=2)
    assert (out / "subset.parquet").read_bytes() == b"mine"
    assert "exists" in refused.stderr


def test_the_commands_are_those_that_a_user_would_type(recipe):
    pipeline = load_pipeline(str(recipe))
    assert [runner().job(step).line for step in pipeline.steps] == [
        "tailwise import tars cat",
        "tailwise cluster --name fine --k 20 cat",
        "tailwise dedup --clustering fine --epsilon 0.2 cat",
        "tailwise filter --by caption-characters --max 7 --without duplicates --name large cat",
        "tailwise cluster --k 6 --without large cat",
        "tailwise plan --method dynamics --budget 5 --dynamic cat epochs",
        "tailwise export --to parquet --epoch 0 --output out/subset.parquet cat epochs",
        "tailwise excluded --output out/removed.parquet cat epochs",
    ]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"clustr": {}}, "step 'clustr' is none: did you mean 'cluster'"),
        ({"status": {}}, "step 'status' is none"),
        ({"train": {"name": "p", "epoch": 5}}, "step train:p has 'epoch', which means nothing: did you mean 'epochs'"),
        (
            {"train": {"name": "p", "open-clip": "--lr 1"}},
            "step train:p: open-clip is '--lr 1': must be names and values",
        ),
        ({"cluster": {"clustrs": 5}}, "step cluster has 'clustrs', which means nothing: use k, merge"),
        ({"cluster": {"clusters": "many"}}, "step cluster: k is 'many': must be a whole number"),
        ({"cluster": {}}, "step cluster: give either `k` K or `extends` CLUSTERING"),
        ({"group": {"by": "shard", "workers": 2}}, "step group: `workers` does nothing without `entries`"),
        ({"cluster": {"k": True}}, "step cluster: k is 'True': must be a whole number"),
        ({"plan": {"name": "p", "method": "flat", "keep": [0.5]}}, "step plan:p: keep is .*: must be a number"),
        ({"embed": {"encoder": "pixels", "workers": 0}}, "step embed: `workers` 0: must be at least 1"),
        ({"draw": {"name": "p", "output": "e", "epoch": -1}}, "epoch is '-1': must be a whole number of at least 0"),
        ({"export": {"name": "p", "to": "keys"}}, "step export:p: output is missing"),
        ({"draw": {"name": "p", "output": {"a": 1}}}, "step draw:p: output is {'a': 1}: must be text"),
        ({"plan": {"name": "p", "method": "flat", "option": "a"}}, "step plan:p: `options` 'a': give NAME=VALUE"),
        ({"cluster": {"k": 5, "catalog": "other"}}, "step cluster has 'catalog', which means nothing"),
        ({"plan": {"name": "p", "method": "flat", "dynamic": 3}}, "step plan:p: dynamic is 3: must be true or false"),
        ({"plan": {"method": "flat"}}, "step plan: name is missing"),
    ],
)
def test_bad_steps_are_named(step, message):
    ((command, options),) = step.items()
    with pytest.raises(UserError, match=message):
        runner().job(Step(command, options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stps": []}, "has 'stps', which means nothing: did you mean 'steps'"),
        ({"steps": []}, "must be a list of at least one step"),
        ({"steps": ["cluster"]}, "step 1 is 'cluster': must be one command and its options"),
        ({"steps": [{"cluster": 5}]}, "step 1 is {'cluster': 5}: must be one command and its options"),
        ({"sources": 5}, "sources is 5: must be a list"),
        ({"about": 5}, "about is 5: must be text"),
    ],
)
def test_bad_recipes_are_named(recipe, change, message):
    recipe.write_text(yaml.safe_dump({**RECIPE, **change}))
    with pytest.raises(UserError, match=message):
        load_pipeline(str(recipe))


@pytest.mark.parametrize(
    ("command", "options", "name"),
    [
        ("import", {}, "dynamics"),
        ("cluster", {"k": 5}, "main"),
        ("dedup", {}, "duplicates"),
        ("filter", {"by": "caption-words", "min": 2}, "caption-words"),
        ("group", {"by": "language"}, "language"),
        ("group", {"entries": "words.txt"}, "entries"),
        ("group", {"entries": "words.txt", "name": "concepts"}, "concepts"),
        ("plan", {"name": "p", "method": "random"}, "p"),
    ],
)
def test_what_a_step_makes(command, options, name):
    assert runner().job(Step(command, options)).makes == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "x"}, "step group:x: give one of `by` COLUMN, `entries` FILE and `concepts` NAME"),
        (
            {"by": "shard", "entries": __file__},
            "step group: give one of `by` COLUMN, `entries` FILE and `concepts` NAME",
        ),
        ({"entries": "nowhere.txt"}, "step group: entries is 'nowhere.txt', which is no file"),
    ],
)
def test_bad_groups_are_refused_before_anything_runs(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        check([Step("group", options)], tmp_path)


def test_lists_may_lie_beside_the_recipe(recipe, _small_catalog_source, tmp_path):
    (recipe.parent / "words.txt").write_text("group\n")
    group = {"group": {"entries": "{folder}/words.txt"}}
    plan = {"plan": {"name": "p", "method": "flat", "keep": 0.5, "clusters": "entries"}}
    recipe.write_text(yaml.safe_dump({**RECIPE, "steps": [{"import": {}}, group, plan]}))
    words = ["run", str(recipe), str(_small_catalog_source), str(tmp_path / "cat"), "--workers", "1"]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    assert "grouping 'entries': 1 groups of 600 samples" in first.output
    again = CliRunner().invoke(app, [*words, "--dry-run"]).output
    (line,) = [line for line in again.splitlines() if "tailwise group" in line]
    assert "is there" in line


def test_nothing_runs_before_all_steps_are_checked(run_tailwise, recipe, _small_catalog_source, tmp_path):
    recipe.write_text(yaml.safe_dump({**RECIPE, "steps": [*RECIPE["steps"], {"plan": {"name": "p", "kep": 0.1}}]}))
    found = run_tailwise(
        "run", recipe, _small_catalog_source / "pool", tmp_path / "catalog", "--output", tmp_path / "out", code=2
    )
    assert found.stderr.strip() == "tailwise: step plan:p has 'kep', which means nothing: did you mean 'keep'?"
    assert not (tmp_path / "catalog").exists()


def test_a_dry_run_names_steps_that_exist_with_other_settings_and_json_lists_all(run_tailwise, small_catalog, tmp_path):
    folder = str(small_catalog.folder)
    run_tailwise("cluster", folder, "--k", "3")
    steps = [{"cluster": {"clusters": 7}}, {"plan": {"name": "p", "method": "dynamics", "keep": 0.5}}]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"name": "r", "about": "r", "catalog": folder, "steps": steps}))
    dry = run_tailwise("run", recipe, "--dry-run")
    assert "OTHER SETTINGS" in dry.stdout
    assert "refused: it exists with other settings (--k 3 → 7)" in dry.stdout
    run_tailwise("run", recipe, code=2)
    made = run_tailwise("run", recipe, "--json", "--set", "cluster.k=3")
    told = json.loads(made.stdout)
    assert next(step["before"] for step in told["steps"]) == "is there"
    assert told["steps"][1]["step"].startswith("tailwise plan")
    assert Plan(small_catalog, "p").draw(0).sum() == 300


def test_settings_change_one_step():
    steps = load_pipeline("dbp-laion").steps
    changed = with_settings(steps, ["cluster:main.clusters=7", "dedup.target-share=0.5"])
    assert [dict(step.options).get("k") for step in changed if step.command == "cluster"] == [50000, "7"]
    assert next(step for step in changed if step.command == "dedup").options["target-share"] == "0.5"
    for text in ("cluster.clusters=7", "plan.keep", "keep=3", "nothing.keep=3"):
        with pytest.raises(UserError, match=r"give STEP\.OPTION=VALUE, where STEP is one of import, cluster:fine"):
            with_settings(steps, [text])


def test_shipped_recipes_state_their_source_and_are_made_of_valid_commands():
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names == {"bootstrap", "dbp-laion", "dbp-datacomp-medium", "dbp-images", "dynamics"}
    for name in names:
        pipeline = load_pipeline(name)
        assert "arXiv" in pipeline.source
        assert "measured by" in pipeline.expect
        made = runner(workers=2)
        jobs = [made.job(step) for step in pipeline.steps]
        for job in jobs:
            assert job.step.command in STEPS
            assert (" --workers 2" in job.line) == (job.step.command in {"import", "embed"})
        made.check(jobs)


def test_a_training_is_a_command_that_can_be_repeated():
    steps = load_pipeline("bootstrap").steps
    train, embed = (runner().job(step) for step in steps if step.command in {"train", "embed"})
    assert train.line == (
        "tailwise train --resume --recipe tiny-cpu --samples-seen 1000000 cat uniform -- --logs out --name bootstrap-clip"
    )
    assert embed.line == "tailwise embed --encoder checkpoint:out/bootstrap-clip --column both cat"
    afresh = Step("train", {"name": "p", "epochs": 1, "resume": False, "open-clip": {"lr": 0.5, "local-loss": True}})
    assert runner(output=None).job(afresh).line == "tailwise train --epochs 1 cat p -- --lr 0.5 --local-loss"


def test_output_in_a_value_needs_an_output():
    with pytest.raises(
        UserError, match=r"step train:uniform: a value is in \{output\}: name that folder with `output`"
    ):
        [runner(output=None).job(step) for step in load_pipeline("bootstrap").steps]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [{"plan": {"name": "p", "method": "flat"}}],
            "step plan:p: clustering is 'main', which no step before it makes",
        ),
        ([{"cluster": {"name": "fine", "k": 5}}, {"plan": {"name": "p", "method": "dbp"}}], "clustering is 'main'"),
        ([{"plan": {"name": "p", "method": "dpb"}}], "unknown method 'dpb': did you mean 'dbp'"),
        (
            [{"export": {"name": "p", "to": "keys", "output": "e"}}],
            "step export:p: name is 'p', which no step before it makes",
        ),
        ([{"cluster": {"k": 5, "without": ["duplicates"]}}], "without is 'duplicates', which no step before it makes"),
        (
            [{"plan": {"name": "p", "method": "mixture", "shares": "a=1", "keep": 0.1}}, {"group": {"by": "source"}}],
            "clustering is 'source', which no step before it makes",
        ),
        (
            [{"plan": {"name": "o", "method": "random"}}, {"plan": {"name": "p", "method": "within", "of": "o"}}],
            "clustering is 'main', which no step before it makes",
        ),
        ([{"plan": {"name": "p", "concepts": "tags", "keep": 0.1}}], "concepts is 'tags', which no step before it"),
        ([{"group": {"concepts": "tags"}}], "concepts is 'tags', which no step before it makes"),
        ([{"concepts": {"name": "both", "both": ["a", "b"]}}], "both is 'a', which no step before it makes"),
        (
            [
                {"plan": {"name": "p", "method": "random", "keep": 0.1}},
                {"train": {"name": "p", "epochs": 1, "compose": "diverse:tags"}},
            ],
            "compose is 'tags', which no step before it makes, and .* has none: add a step concepts",
        ),
        ([{"filter": {"only": "list.npy"}}], "only is 'list.npy', which is no file"),
        ([{"filter": {"not": "list.npy"}}], "exclude is 'list.npy', which is no file"),
        ([{"plan": {"name": "p", "rates": "r.json"}}], "rates is 'r.json', which is no file"),
        ([{"score": {"name": "s", "head": "h.pth"}}], "head is 'h.pth', which is no file"),
        ([{"plan": {"name": "p", "method": "scs", "score": "s", "score-file": "s.csv"}}], "score-file is 's.csv'"),
        ([{"train": {"name": "p", "epochs": 1}}], "step train:p: name is 'p', which no step before it makes"),
        (
            [
                {"plan": {"name": "p", "method": "random"}},
                {"train": {"name": "p", "recipe": "tiny-cpu"}},
                {"embed": {"encoder": "checkpoint:logs/p"}},
            ],
            "encoder is 'checkpoint:logs/p', which no step before it trains",
        ),
    ],
)
def test_names_that_nothing_makes_are_refused(steps, message, tmp_path):
    made = [Step(*item) for step in steps for item in step.items()]
    with pytest.raises(UserError, match=message):
        check(made, tmp_path)


def test_steps_may_name_what_earlier_steps_make(tmp_path):
    made = [
        Step("group", {"by": "source"}),
        Step("concepts", {"name": "tags", "entries": __file__}),
        Step("concepts", {"name": "words", "entries": __file__}),
        Step("concepts", {"name": "agreed", "both": ["tags", "words"]}),
        Step("group", {"concepts": "agreed", "name": "g"}),
        Step("plan", {"name": "p", "method": "mixture", "shares": "a=1", "keep": 0.1}),
        Step("export", {"name": "p", "to": "keys", "output": "keys.txt"}),
        Step("filter", {"only": "out/keys.txt"}),
        Step("train", {"name": "p", "epochs": 1, "compose": "diverse:agreed"}),
    ]
    check(made, tmp_path)


def test_shares_may_be_a_mapping(run_tailwise, small_catalog, tmp_path):
    """Also of groups that are numbers, or have commas in their names, which the text of --shares cannot say."""
    groups, names = tmp_path / "groups.csv", ("1", "2", '"a,b=c"')
    groups.write_text("".join(["key,g\n", *(f"{row:06d},{names[row % 3]}\n" for row in range(600))]))
    plan = {"method": "mixture", "clustering": "g", "shares": {1: 3, "a,b=c": 1.0}, "keep": 0.1}
    steps = [{"group": {"by": "g", "file": str(groups)}}, {"plan": {"name": "p", **plan}}]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"name": "r", "about": "r", "catalog": str(small_catalog.folder), "steps": steps}))
    run_tailwise("run", recipe)
    drawn = Plan(small_catalog, "p").draw(0)
    assert np.array_equal(np.bincount(np.flatnonzero(drawn) % 3), [45, 0, 15])
    assert "is there" in run_tailwise("run", recipe, "--dry-run").stdout
    for shares, told in (({"1": "x"}, "shares: 1 is 'x': must be a number"), ([1], r"shares is \[1\]: must be text")):
        with pytest.raises(UserError, match=told):
            runner().job(Step("plan", {"name": "p", **plan, "shares": shares}))


@pytest.mark.parametrize(
    ("step", "option"),
    [
        ({"filter": {"by": "q", "keep": 0.5}}, "by"),
        ({"filter": {"only": __file__, "refill": "q"}}, "refill"),
        ({"plan": {"name": "p", "method": "top-score", "score": "q", "keep": 0.5}}, "score"),
        ({"dedup": {"exact": "bytes", "order": "score", "score": "q"}}, "score"),
        ({"score": {"name": "m", "mix": "q + caption-words"}}, "mix"),
    ],
)
def test_scores_that_nothing_makes_are_refused(small_catalog, tmp_path, step, option):
    ((command, options),) = step.items()
    used = Step(command, options)
    made = Step("score", {"name": "q", "mix": "caption-words"})
    for steps, catalog, message in (
        ([used], tmp_path, f"{option} is 'q', which no step before it makes, and .* has none: add a step score"),
        (
            [used, made],
            small_catalog.folder,
            "no score 'q': use clip-score, .*, or a score that `tailwise score` named",
        ),
    ):
        with pytest.raises(UserError, match=f"step {used.label}: {message}"):
            check(steps, catalog)
    check([made, used], small_catalog.folder)
    check([Step("import", {}), used], tmp_path / "new")  # it may have a column of this name
    for name in ("caption-words", "width"):  # there always, and a column
        check([Step(command, {**options, option: options[option].replace("q", name)})], small_catalog.folder)
    make_named_score(small_catalog, NamedScoreRequest(name="q", mix="caption-words"))
    check([used], small_catalog.folder)
    scores = {"score-file" if command == "plan" else "file": __file__}
    if option in {"by", "score"} and command != "dedup":
        check([Step(command, {**options, "by" if option == "by" else "score": "x", **scores})], small_catalog.folder)


def test_a_dry_run_compares_what_scores_are_made_of(run_tailwise, small_catalog, tmp_path):
    rows = "".join(["key,q\n", *(f"{row:06d},{row}\n" for row in range(600))])
    (tmp_path / "q.csv").write_text(rows)
    steps = [
        {"score": {"name": "q", "file": str(tmp_path / "q.csv")}},
        {"score": {"name": "m", "mix": "0.5*z(q)+q"}},
        {"filter": {"by": "m", "keep": 0.5, "name": "f"}},
    ]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"name": "r", "about": "r", "catalog": str(small_catalog.folder), "steps": steps}))
    run_tailwise("run", recipe)
    (tmp_path / "q.csv").rename(tmp_path / "r.csv")
    changes = [f"score:q.file={tmp_path / 'r.csv'}", "score:m.mix=0.5 * z( q ) + q"]
    same = ["run", recipe, *(word for change in changes for word in ("--set", change))]
    assert run_tailwise(*same, "--dry-run").stdout.count(" is there ") == 3
    run_tailwise(*same)
    other = run_tailwise("run", recipe, *same[2:], "--set", "filter:f.by=q", "--dry-run").stdout
    assert "refused: it exists with other settings (--by m → q)" in other


def test_a_dry_run_takes_a_finished_score_for_the_same(run_tailwise, small_catalog, tmp_path):
    steps = [{"plan": {"name": "p", "method": "top-score", "score": "caption-words", "keep": 0.5}}]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"name": "r", "about": "r", "catalog": str(small_catalog.folder), "steps": steps}))
    run_tailwise("run", recipe)
    assert "is there" in run_tailwise("run", recipe, "--dry-run").stdout


@pytest.mark.parametrize(
    ("training", "checkpoint"),
    [
        ({"recipe": "tiny-cpu"}, "logs/p-tiny-cpu"),
        ({"recipe": "dynamics-vit-b16"}, "logs/p-dynamics-vit-b16-phase2"),
        ({"epochs": 3}, "logs/p/checkpoints/epoch_3.pt"),
        ({"epochs": 3, "open-clip": {"logs": "runs", "name": "a"}}, "runs/a"),
    ],
)
def test_an_encoder_that_an_earlier_step_trains_is_known(training, checkpoint, tmp_path):
    plan, train = Step("plan", {"name": "p", "method": "random"}), Step("train", {"name": "p", **training})
    embed = Step("embed", {"encoder": f"checkpoint:{checkpoint}"})
    check([plan, train, embed], tmp_path)
    with pytest.raises(UserError, match="which no step before it trains"):
        check([plan, embed, train], tmp_path)


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(
        UserError,
        match="there is no recipe 'dynamix': give bootstrap, dbp-datacomp-medium, dbp-images, dbp-laion, dynamics",
    ):
        load_pipeline("dynamix")
