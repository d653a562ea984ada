import json
import subprocess
import sys

import pytest
from open_clip_train.params import parse_args

from tailwise.errors import UserError
from tailwise.text import option_words
from tailwise.train.arguments import FREE, OWNED, deciding, parse, refuse_owned, require_model, take_factors


@pytest.mark.parametrize("owned", OWNED)
def test_what_is_ours_is_refused_in_every_spelling(owned):
    for words in ([owned, "x"], [f"{owned}=x"], [owned[:-1], "x"]):
        with pytest.raises(UserError, match=f"{owned} can't be given"):
            refuse_owned(["--lr", "1e-3", *words])


def test_the_rest_is_not():
    refuse_owned(
        ["--lr", "1e-3", "--epochs-cooldown", "2", "--wd", "0.1", "--dataset-type", "csv", "--aug-cfg", "scale=(0.4,1)"]
    )


def test_a_model_is_asked_for():
    for given in (["--model", "RN50"], ["--lr", "1", "--model=RN50"], ["--mod", "RN50"], ["--help"]):
        require_model(given)
    for missing in ([], ["--lr", "1e-3", "--name", "model"], ["--model-ema"]):
        with pytest.raises(UserError, match="name the model: give --model NAME after the --"):
            require_model(missing)


def test_the_trainer_is_not_imported_to_refuse_a_training_without_a_model(tmp_path):
    code = "import sys\nfrom tailwise.cli import main\nsys.argv[0] = 'tailwise'\ntry: main()\nfinally: print('torch' in sys.modules)"
    words = ["train", tmp_path, "p", "--epochs", "1", "--", "--batch-size", "8"]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "False\n")
    assert result.stderr.startswith("tailwise: name the model: give --model NAME after the --")


def test_owned_and_free_arguments_exist_in_open_clip():
    names = set(vars(parse_args([])))
    assert {name.removeprefix("--").replace("-", "_") for name in OWNED} <= names
    assert names >= FREE


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lr", "fast"], "open_clip: argument --lr: invalid float value: 'fast'"),
        (["--no-such-thing"], "unrecognized arguments: --no-such-thing"),
        (["--dataset-type", "synthetic"], "synthetic can't be given"),
        (["--logs", "none"], "give one"),
        (["--batch-size", "0"], "`batch_size` 0: must be at least 1"),
    ],
)
def test_open_clip_s_own_errors_are_one_line(argv, said, capsys):
    with pytest.raises(UserError, match=said):
        parse(argv, parse_args)
    assert capsys.readouterr().err == ""


def test_spelling_comes_back_from_open_clip_s_parser():
    arguments = {
        "aug-cfg": {"scale": [0.4, 1.0], "use_timm": False},
        "local-loss": True,
        "lr": 8.75e-4,
        "image-mean": [0.5, 0.4, 0.3],
    }
    parsed = parse(option_words({**arguments, "debug": False, "name": None}), parse_args)
    assert parsed.aug_cfg == {"scale": (0.4, 1.0), "use_timm": False}
    assert (parsed.local_loss, parsed.lr, parsed.image_mean, parsed.debug, parsed.name) == (
        True,
        8.75e-4,
        [0.5, 0.4, 0.3],
        False,
        None,
    )


def test_what_decides_a_training():
    base = ["--model", "ViT-B-32", "--lr", "1e-3"]
    same = ["--workers", "7", "--log-every-n-steps", "1", "--imagenet-val", "x", "--device", "cpu", "--batch-size", "9"]
    first = deciding(parse(base, parse_args))
    assert first == deciding(parse([*base, *same], parse_args))
    assert first == json.loads(json.dumps(first))
    for other in (
        ["--lr", "2e-3"],
        ["--warmup", "3"],
        ["--precision", "fp32"],
        ["--aug-cfg", "scale=(0.1,1)"],
        ["--model", "RN50"],
    ):
        assert deciding(parse([*base, *other], parse_args)) != first


def test_a_local_model_is_known_by_what_it_is(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "open_clip_config.json").write_text("{}")
    a, b = (deciding(parse(["--model", f"local-dir:{tmp_path / name}"], parse_args)) for name in ("a", "b"))
    assert a == b
    (tmp_path / "b" / "open_clip_config.json").write_text('{"other": 1}')
    assert a != deciding(parse(["--model", f"local-dir:{tmp_path / 'b'}"], parse_args))
    with pytest.raises(UserError, match="give a folder that holds it"):
        deciding(parse(["--model", f"local-dir:{tmp_path}"], parse_args))


def test_the_arguments_of_a_mixture_are_taken_out():
    words = [
        "--lr",
        "1e-3",
        "--train-data",
        "a::b",
        "--dataset-resampled",
        "--train-data-upsampling-factors=1::2",
        "--wd",
        "0",
    ]
    assert take_factors(words) == (["--lr", "1e-3", "--wd", "0"], "1::2", "a::b")
    for untouched in (["--train-data", "a::b", "--lr", "1"], ["--dataset-resampled"], []):
        assert take_factors(untouched) == (untouched, None, None)
