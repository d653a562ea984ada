import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import yaml
from open_clip_train.params import parse_args

from tailwise.errors import UserError
from tailwise.recipes import load_recipe
from tailwise.recipes.recipe import FOLDER
from tailwise.text import option_words
from tailwise.train.arguments import deciding, parse, refuse_owned

GOOD = {
    "name": "mine",
    "about": "…",
    "source": "…",
    "command": "…",
    "plan": "…",
    "expect": {"measured by": "nobody"},
    "phases": [{"epochs": 2, "open_clip": {"lr": 1e-3}}, {"samples_seen": 1000}],
}


def written(tmp_path, **changes):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return str(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_shipped_recipes_are_taken_by_open_clip(name):
    recipe = load_recipe(name)
    assert (FOLDER / f"{name}.yaml").exists()
    assert recipe.name == name
    assert recipe.expect["measured by"]
    assert f"--recipe {name}" in recipe.command
    for phase in recipe.phases:
        words = option_words(phase.open_clip)
        refuse_owned(words)
        model = deciding(parse(words, parse_args))["--model"]
        assert model in open_clip.list_models() or model.startswith("local-dir:")


def test_dynamics_has_the_authors_settings():
    first, second = load_recipe("dynamics-vit-b16").phases
    assert first.open_clip["lr"] == pytest.approx(8e-6 * first.global_batch / 256)
    assert second.open_clip["lr"] == pytest.approx(4e-7 * second.global_batch / 256)
    assert second.open_clip["warmup"] == 0.1 * second.samples_seen / second.global_batch
    assert first.open_clip["force-image-size"] == 112
    assert second.open_clip["force-image-size"] == 224
    assert second.open_clip["aug-cfg"] == first.open_clip["aug-cfg"] == {"scale": [0.4, 1.0]}


def test_each_published_run_of_dynamics_has_a_recipe_that_differs_in_length_alone():
    base = load_recipe("dynamics-vit-b16")
    for name, long in (("dfn-2.56b", 2_560_000_000), ("laion-2.56b", 2_560_000_000)):
        recipe = load_recipe(f"dynamics-vit-b16-{name}")
        assert [phase.samples_seen for phase in recipe.phases] == [long, 128_000_000]
        assert [replace(phase, samples_seen=1) for phase in recipe.phases] == [
            replace(phase, samples_seen=1) for phase in base.phases
        ]
        assert recipe.plan == base.plan
        assert recipe.expect["GPU hours"] != base.expect["GPU hours"]


def test_a_base_lends_what_a_recipe_does_not_change(tmp_path):
    below = tmp_path / "base"
    below.mkdir()
    (below / "base.yaml").write_text(
        yaml.safe_dump(
            {
                **GOOD,
                "phases": [
                    {"epochs": 2, "lanes": 4, "open_clip": {"model": "local-dir:{folder}", "lr": 1}},
                    {"epochs": 3},
                ],
            }
        )
    )
    changes = {
        "base": "{folder}/base/base.yaml",
        "name": "other",
        "phases": [{"samples_seen": 9, "open_clip": {"lr": 2, "wd": 0}}, None],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(changes))
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert (recipe.name, recipe.about) == ("other", GOOD["about"])
    first, second = recipe.phases
    assert (first.epochs, first.samples_seen, first.lanes) == (None, 9, 4)
    assert first.open_clip == {"model": f"local-dir:{below}", "lr": 2, "wd": 0}
    assert (second.epochs, second.samples_seen) == (3, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": "tiny-cpi"}, "there is no recipe 'tiny-cpi'"),
        ({"base": 5}, "base is 5: must be text"),
        ({"base": "dynamics-vit-b16-dfn-2.56b"}, "base is 'dynamics-vit-b16-dfn-2.56b', which has a base itself"),
        (
            {"base": "dynamics-vit-b16", "phases": [{}]},
            "phases must list 2 changes, one for each phase of .*dynamics-vit-b16.yaml",
        ),
        ({"base": "dynamics-vit-b16", "phases": {}}, "phases must list 2 changes"),
        ({"base": "tiny-cpu", "phases": ["x"]}, "phase 1 is 'x'"),
        ({"base": "tiny-cpu", "phases": [{"open_clip": 3}]}, "open_clip is 3: must be names and values"),
        ({"base": "tiny-cpu", "phases": [{"epoch": 3}]}, "did you mean 'epochs'"),
        ({"base": "tiny-cpu", "nam": "x"}, "has 'nam', which means nothing: did you mean 'name'"),
    ],
)
def test_mistakes_about_a_base_are_named(tmp_path, changes, said):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(changes))
    with pytest.raises(UserError, match=said):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_datacomp_medium_is_what_datacomp_s_trainer_gives_open_clip():
    (phase,) = load_recipe("datacomp-medium").phases
    defaults, ours = (
        vars(parse([*words, "--model", "ViT-B-32"], parse_args)) for words in ([], option_words(phase.open_clip))
    )
    assert {name for name in ours if ours[name] != defaults[name]} == {
        *("warmup", "aug_cfg", "local_loss", "gather_with_grad", "ddp_static_graph")
    }
    assert open_clip.transform.AugmentationCfg(**ours["aug_cfg"]) == open_clip.transform.AugmentationCfg()
    assert (phase.samples_seen, phase.global_batch) == (128_000_000, 4096)


def test_a_recipe_of_one_s_own(tmp_path):
    recipe = load_recipe(
        written(tmp_path, phases=[{"epochs": 2, "open_clip": {"model": "local-dir:{folder}/m", "lr": 1e-3}}])
    )
    assert recipe.phases[0].open_clip == {"model": f"local-dir:{tmp_path}/m", "lr": 1e-3}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"phase": []}, "did you mean 'phases'"),
        ({"phases": []}, "at least one phase"),
        ({"phases": [{"epoch": 2}]}, "phase 1 has 'epoch', which means nothing: did you mean 'epochs'"),
        ({"phases": [{"epochs": 0}]}, "epochs is 0: must be a whole number of at least 1"),
        ({"phases": [{"epochs": True}]}, "epochs is True"),
        ({"phases": [{"epochs": 1}, {}]}, "phase 2: give either epochs or samples_seen"),
        ({"phases": [{"epochs": 1, "samples_seen": 5}]}, "give either"),
        ({"phases": [{"epochs": 1, "open_clip": ["--lr"]}]}, "phase 1: open_clip is .*: must be names and values$"),
        ({"phases": ["x"]}, r"phase 1 is 'x': must be names and values \(epochs, samples_seen, "),
        ({"phases": [{"epochs": 1}, {"lanes": "4"}]}, "phase 2: lanes is '4': must be a whole number of at least 1"),
        ({"phases": {"epochs": 1}}, "phases is .*: must be a list of at least one phase"),
        ({"phase": [], "phases": []}, "has 'phase', which means nothing"),  # before what is missing for that reason
        ({"plan": None}, "mine.yaml lacks 'plan': add it"),
        ({"expect": 64.1}, "expect is 64.1: must be names and values"),
        ({"about": 3}, "about is 3: must be text"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        load_recipe(written(tmp_path, **changes))


def test_what_is_no_recipe(tmp_path):
    with pytest.raises(
        UserError, match="there is no recipe 'tiny-gpu': give datacomp-medium, dbp-vit-b32, dynamics-vit-b16, "
    ):
        load_recipe("tiny-gpu")
    path = tmp_path / "bad.yaml"
    path.write_text("name: [")
    with pytest.raises(UserError, match="can't be read"):
        load_recipe(str(path))
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="can't be read"):
        load_recipe(str(path))
    path.write_text("just text")
    with pytest.raises(UserError, match=r"is 'just text': must be names and values \(name, about, "):
        load_recipe(str(path))
    path.write_text("5: x")
    with pytest.raises(UserError, match="has '5', which means nothing: use name, about, "):
        load_recipe(str(path))
    path.write_text(yaml.safe_dump({name: value for name, value in GOOD.items() if name != "source"}))
    with pytest.raises(UserError, match="lacks 'source'"):
        load_recipe(str(path))


def test_the_tiny_model_s_configuration_is_shipped():
    model = load_recipe("tiny-cpu").phases[0].open_clip["model"]
    config = json.loads((Path(model.removeprefix("local-dir:")) / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["image_size"] == 32
