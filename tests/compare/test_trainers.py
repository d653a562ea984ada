"""The fast trainer: the same batches, losses and weights as open_clip's own, and the same bytes again."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tailwise.catalog import Catalog
from tailwise.compare.images import decoded_pool
from tailwise.compare.recipe import Training
from tailwise.compare.trainers import (
    Steps,
    _is_plain,
    _logged_steps,
    _make,
    _open_clip,
    _Source,
    augmentation,
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
from tailwise.train.data import checksum
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
    source = _Source(plan, settings, order_of(plan, settings, "shuffle", 5), tmp_path / "cache", model, Context())
    factory = _open_clip()
    _, preprocess, _ = factory.create_model_and_transforms(small_model, aug_cfg=augmentation(settings))
    loader = Loader(
        plan, batch_size=16, seed=5, transform=preprocess,
        tokenizer=factory.get_tokenizer(small_model), max_replaced=1.0,
    )  # fmt: skip
    replaced = 0
    for number, theirs in zip(range(4), loader, strict=False):
        mine = source.dataset[number]
        assert torch.equal(mine.rows, theirs.rows)
        assert torch.equal(mine.texts, theirs.texts)
        assert torch.equal(mine.images, theirs.images)
        replaced += len(theirs.replaced)
    loader.close()
    assert replaced > 5
    # Six of each tar's 40 images are broken, neither of the two removed ones among them.
    strict = training(small_model, samples_seen=64, global_batch=16)
    with pytest.raises(
        UserError, match=r"12 of 78 samples \(15.4%\) of the pool can't be read, more than train.max_rejected 0.1: "
    ):
        _Source(plan, strict, order_of(plan, strict, "shuffle", 5), tmp_path / "cache", model, Context())


@pytest.mark.parametrize("augment", [None, {"scale": [0.5, 1.0]}], ids=["whole", "cropped"])
def test_images_that_are_not_square_are_those_of_open_clips_trainer(
    make_tar, make_image, small_model, tmp_path, monkeypatch, augment
):
    """The pixels that reach the model, in each of the two trainers, read from the record of open_clip's."""
    members = []
    for at in range(64):
        image = Image.open(io.BytesIO(make_image(at, side=80))).crop((0, 0, 60 if at % 3 else 80, 80 if at % 3 else 60))
        encoded = io.BytesIO()
        image.save(encoded, "JPEG")
        members += [(f"{at:03d}.jpg", encoded.getvalue()), (f"{at:03d}.txt", f"drawing {at}".encode())]
    make_tar(tmp_path / "pool" / "0.tar", members)
    from tailwise.steps.importing.pool import import_pool

    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog
    plan = make_plan(catalog, "half", PlanRequest("random", keep=0.5))
    settings = training(small_model, augment=augment, samples_seen=96, global_batch=16, workers=0)
    words = [*option_words(open_clip_arguments(settings)), "--logs", str(tmp_path), "--name", "theirs"]
    train(plan, words, TrainRequest(samples_seen=96, seed=3, record=tmp_path / "record"), report=lambda _: None)
    lines = (tmp_path / "record" / "theirs.rank-0.jsonl").read_text().splitlines()
    theirs = [(line["rows"], line["pixels"], line["texts"]) for line in map(json.loads, lines)]
    mine = []
    take = Steps.take

    def noted(self, number, images, texts):
        mine.append((checksum(images), checksum(texts)))
        return take(self, number, images, texts)

    monkeypatch.setattr(Steps, "take", noted)
    run(plan, settings, tmp_path / "mine", seed=3)
    order = order_of(plan, settings, "shuffle", 3)
    assert [(order.batch(number).rows.tolist(), *item) for number, item in enumerate(mine)] == theirs
    assert len({pixels for _, pixels, _ in theirs}) == len(theirs) == 6


def test_batches_are_the_same_for_any_number_of_workers_and_differ_by_seed(plan, small_model, tmp_path):
    def images(seed, **changes):
        settings = training(small_model, augment={"scale": [0.5, 1.0]}, samples_seen=96, **changes)
        model = _make(small_model, CPU)
        source = _Source(plan, settings, order_of(plan, settings, "shuffle", seed), tmp_path, model, Context())
        return torch.stack([batch.images for batch in source])

    wanted = images(0, workers=0)
    assert wanted.shape == (3, 32, 3, 32, 32)
    assert torch.equal(images(0, workers=2), wanted)
    assert not torch.equal(images(1, workers=0), wanted)


def test_cached_images_may_be_made_smaller(plan, small_model, tmp_path):
    pool = decoded_pool(plan.catalog, plan.snapshot, tmp_path, most_pixels=20)
    whole = decoded_pool(plan.catalog, plan.snapshot, tmp_path)
    for row in range(5):
        (small, caption), (large, same) = pool.of(row), whole.of(row)
        assert min(small.shape[:2]) == 20 < min(large.shape[:2])
        assert caption == same


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
