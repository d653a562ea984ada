"""The fast trainer: the same batches, losses and weights as open_clip's own, and the same bytes again."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tailwise.catalog import Catalog
from tailwise.compare.images import crop_and_resize, crop_boxes, uniform_numbers
from tailwise.compare.recipe import Training
from tailwise.compare.trainers import (
    Steps,
    _is_plain,
    _logged_steps,
    _make,
    _open_clip,
    _Source,
    open_clip_arguments,
    order_of,
    train_by_open_clip,
    train_in_process,
)
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.loader.loader import Loader
from tailwise.requests import PlanRequest, TrainRequest
from tailwise.steps.planning.plan import make_plan
from tailwise.text import option_words
from tailwise.train.launch import train

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
# Two bf16 trainings may sum in another order, and then round a product to the neighbouring bf16 number. A logit is the logit scale,
# 1 / 0.07 = 14.3 at first, times a cosine. bf16 has 8 significant bits: below 16, half a unit in the last place is 2⁻⁵. The loss is a mean
# of terms logsumexp − logit, each of which changes by at most twice the error of a logit; and each of the two trainings has that error.
BF16_LOSS_BOUND = 2 * 2 * 2.0**-5


@pytest.fixture(scope="module")
def plan(drawn_pool):
    return make_plan(Catalog.open(drawn_pool / "catalog"), "half", PlanRequest("random", keep=0.5))


def training(model, **changes):
    return Training(
        **{"model": model, "samples_seen": 384, "global_batch": 32, "warmup": 3, "device": "cpu", **changes}
    )


def run(plan, settings, folder, seed=0, compose="shuffle"):
    cache = folder.parent / "cache"
    return train_in_process(plan, settings, seed=seed, compose=compose, folder=folder, cache=cache, name="run")


@pytest.mark.parametrize(
    ("vision", "precision"),
    [
        ({"patch_size": 8, "width": 64, "head_width": 32, "layers": 2, "patch_dropout": 0.5}, "fp32"),
        ({"layers": [1, 1, 1, 1], "width": 8, "head_width": 32}, "fp32"),
        ({"layers": [1, 1, 1, 1], "width": 8, "head_width": 32}, "bf16"),
    ],
    ids=["vit", "resnet", "resnet-bf16"],
)
def test_the_losses_and_weights_are_those_of_open_clips_trainer(plan, write_model, tmp_path, vision, precision):
    settings = training(write_model(**vision), precision=precision, workers=0)
    mine = run(plan, settings, tmp_path / "mine", seed=3, compose="spread")
    words = [*option_words(open_clip_arguments(settings)), "--logs", str(tmp_path), "--name", "theirs"]
    words += ["--log-every-n-steps", "1"]
    train(plan, words, TrainRequest(samples_seen=384, seed=3, compose="spread"), report=lambda _: None)
    log = (tmp_path / "theirs" / "out.log").read_text()
    theirs = [float(loss) for loss in re.findall(r"Train Epoch.* Loss: ([0-9.]+) ", log)]
    losses = np.load(tmp_path / "mine" / "losses.npy")
    assert len(losses) == len(theirs) == 12
    bound = 1e-3 if precision == "fp32" else BF16_LOSS_BOUND
    assert losses == pytest.approx(theirs, abs=bound)
    assert np.abs(np.roll(losses, 1) - theirs).max() > 4 * bound  # batches out of place would not pass
    assert mine.samples == 384
    weights = torch.load(mine.checkpoint, weights_only=True)["state_dict"]
    checkpoint = tmp_path / "theirs" / "checkpoints" / "epoch_12.pt"
    wanted = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert weights.keys() == wanted.keys()
    if precision == "fp32":
        for name, value in weights.items():
            torch.testing.assert_close(value, wanted[name], rtol=0.02, atol=2e-3, msg=name)


def test_the_same_again_gives_the_same_bytes_and_another_seed_other_ones(plan, small_model, tmp_path):
    settings = training(small_model, augment={"scale": [0.5, 1.0]}, precision="bf16")
    random_state = torch.get_rng_state()
    first, again = run(plan, settings, tmp_path / "a" / "run"), run(plan, settings, tmp_path / "b" / "run")
    assert torch.equal(random_state, torch.get_rng_state())
    assert first.checkpoint.read_bytes() == again.checkpoint.read_bytes()
    assert (first.last_loss, first.unique, first.epochs) == (again.last_loss, again.unique, again.epochs)
    other = run(plan, settings, tmp_path / "a" / "other", seed=1)
    assert first.checkpoint.read_bytes() != other.checkpoint.read_bytes()
    assert first.epochs == 1
    assert first.unique == 384
    assert np.isfinite(np.load(tmp_path / "a" / "run" / "losses.npy")).all()


def test_batches_are_the_loaders_with_stand_ins_for_what_is_broken(make_tar, make_image, small_model, tmp_path):
    from tailwise.steps.importing.pool import import_pool
    from tailwise.steps.upkeep.remove import remove

    for shard in range(2):
        members = []
        for at in range(40):
            key = f"{shard}{at:03d}"
            image = make_image(int(key), side=48) if at % 7 else b"broken"
            members += [(f"{key}.jpg", image), (f"{key}.txt", f"drawing {key}".encode())]
        make_tar(tmp_path / "pool" / f"{shard:05d}.tar", members)
    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog
    plan = make_plan(catalog, "half", PlanRequest("random", keep=0.5))
    (tmp_path / "keys.txt").write_text("0003\n1005\n")
    remove(catalog, tmp_path / "keys.txt")
    settings = training(small_model, samples_seen=64, global_batch=16, max_rejected=1.0)
    model = _make(small_model, CPU)
    source = _Source(plan, settings, order_of(plan, settings, "shuffle", 5), tmp_path / "cache", model, CPU, Context())
    factory = _open_clip()
    _, _, preprocess = factory.create_model_and_transforms(small_model)
    loader = Loader(
        plan, batch_size=16, seed=5, transform=preprocess,
        tokenizer=factory.get_tokenizer(small_model), max_replaced=1.0,
    )  # fmt: skip
    replaced = 0
    for number, batch in zip(range(5), loader, strict=False):
        images, texts, rows = source.batch(number)
        np.testing.assert_array_equal(rows, batch.rows.numpy())
        torch.testing.assert_close(texts, batch.texts.long())
        torch.testing.assert_close(images.contiguous(), batch.images, rtol=0, atol=1e-6)
        replaced += len(batch.replaced)
    loader.close()
    assert replaced > 5
    # Six of each tar's 40 images are broken, neither of the two removed ones among them.
    strict = training(small_model, samples_seen=64, global_batch=16)
    with pytest.raises(
        UserError, match=r"12 of 78 samples \(15.4%\) of the pool can't be read, more than train.max_rejected 0.1: "
    ):
        _Source(plan, strict, order_of(plan, strict, "shuffle", 5), tmp_path / "cache", model, CPU, Context())


def test_crops_change_with_every_epoch_and_seed(plan, small_model, tmp_path):
    model = _make(small_model, CPU)

    def source_of(seed, **changes):
        settings = training(small_model, **changes)
        return _Source(plan, settings, order_of(plan, settings, "shuffle", seed), tmp_path, model, CPU, Context())

    def first(seed, **changes):
        return source_of(seed, **changes).batch(0)[0]

    plain, cropped = first(0), first(0, augment={"scale": [0.5, 1.0]})
    assert plain.shape == cropped.shape == (32, 3, 32, 32)
    assert not torch.equal(plain, cropped)
    assert torch.equal(cropped, first(0, augment={"scale": [0.5, 1.0]}))
    assert (cropped.mean(dim=(2, 3)) - plain.mean(dim=(2, 3))).abs().median() < 0.3
    source = source_of(4, augment={"scale": [0.5, 0.7]})
    images, _, rows = source.batch(13)  # epochs are of 12.5 batches: it lies in two
    boxes = crop_boxes(uniform_numbers(4, source.order.batch(13).epochs, 13 * 32), (0.5, 0.7))
    pixels = torch.from_numpy(source._pictures.pixels[rows]).float()
    assert pixels.shape == (32, 3, 40, 40)
    wanted = (crop_and_resize(pixels, boxes, 32) / 255 - source._mean) / source._std
    torch.testing.assert_close(images.contiguous(), wanted, rtol=0, atol=1e-5)


def test_gains_and_biases_are_not_decayed_and_the_logit_scale_is_bounded(small_model):
    model = _make(small_model, CPU)
    names = {id(value): name for name, value in model.named_parameters()}
    steps = Steps(model, training(small_model, wd=0.3), 12, CPU)
    plain, rest = steps._optimizer.param_groups
    assert (plain["weight_decay"], rest["weight_decay"]) == (0.0, 0.3)
    plain, rest = ({names[id(value)] for value in group["params"]} for group in (plain, rest))
    assert "logit_scale" in plain
    assert "token_embedding.weight" in rest
    assert "ln_final.weight" in plain
    assert plain | rest == set(names.values())
    assert _is_plain("text.ln_1.weight", torch.zeros(2, 2))
    assert not _is_plain("text.weight", torch.zeros(2, 2))
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    steps.take(0, torch.randn(8, 3, 32, 32), torch.randint(1, 9, (8, 16)))
    assert model.logit_scale.item() == pytest.approx(np.log(100), abs=1e-6)


def test_mistakes_are_told_in_a_line(plan, small_model, tmp_path):
    with pytest.raises(UserError, match="without augment"):
        run(plan, training(small_model, cache_pixels=40), tmp_path / "run")
    with pytest.raises(UserError, match="can't be made"):
        run(plan, training("local-dir:/nowhere"), tmp_path / "run")
    with pytest.raises(ArithmeticError, match=r"lower train\.lr"):
        run(plan, training(small_model, lr=1e30), tmp_path / "run")


def test_the_open_clip_trainer_runs_in_a_process_of_its_own(plan, small_model, tmp_path, forked_commands, monkeypatch):
    monkeypatch.setattr("tailwise.compare.trainers.subprocess", forked_commands(real=1))
    settings = training(small_model, trainer="open_clip", samples_seen=128, workers=0)
    asked = {"seed": 0, "compose": "shuffle", "folder": tmp_path, "cache": tmp_path, "name": "run"}
    first = train_by_open_clip(plan, settings, **asked)
    assert first.samples == 128
    assert first.checkpoint.exists()
    assert json.loads((tmp_path / "training" / "tailwise.json").read_text())["finished"]
    with pytest.raises(UserError, match="trainer ended with code 2"):
        train_by_open_clip(
            plan, training(small_model, open_clip={"train-data": "x"}), **{**asked, "folder": tmp_path / "b"}
        )


def test_steps_are_read_from_the_log_of_the_trainer(tmp_path):
    log = tmp_path / "trainer.log"
    lines = [
        f"Train Epoch: {epoch} [{samples:>3}/80 (9%)] Loss" for epoch, samples in ((0, 8), (0, 40), (1, 8), (2, 24))
    ]
    log.write_text("Train Epoch: 9 [ 80/80\n")  # of the run before it was killed
    written = log.stat().st_size
    program = f"import sys, time\nfor line in {lines}:\n    print(line, flush=True)\ntime.sleep(1.5)"
    with log.open("ab") as stream, subprocess.Popen([sys.executable, "-c", program], stdout=stream) as process:
        assert list(_logged_steps(process, log, written, 10, 8)) == [*range(23)]
        process.kill()
