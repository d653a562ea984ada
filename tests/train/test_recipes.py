import json
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


@pytest.mark.parametrize("name", ["dbp-vit-b32", "dynamics-vit-b16", "tiny-cpu"])
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
    with pytest.raises(UserError, match="there is no recipe 'tiny-gpu': give dbp-vit-b32, dynamics-vit-b16, tiny-cpu"):
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
