import importlib.metadata
from types import SimpleNamespace

import pytest

from tailwise.errors import UserError
from tailwise.train.arguments import parse
from tailwise.train.guard import find_trainer


def test_the_installed_trainer_is_as_expected():
    trainer = find_trainer()
    assert trainer.version == importlib.metadata.version("open_clip_torch")
    assert trainer.ranks() == (0, 1)


@pytest.mark.parametrize("name", ["get_data", "train_one_epoch", "LATEST_CHECKPOINT_NAME"])
def test_what_has_gone_is_named(name, monkeypatch):
    import open_clip_train.main

    monkeypatch.delattr(open_clip_train.main, name)
    with pytest.raises(UserError, match=rf"open_clip_train\.main\.{name} moved .*3\.3\.0"):
        find_trainer()


def test_another_way_to_take_data_is_noticed(monkeypatch):
    import open_clip_train.main

    def train_one_epoch(model, data, loss, epoch):
        data["train"].set_epoch(epoch)
        dataloader = data["train"].loader
        return dataloader.num_batches, dataloader.num_samples

    monkeypatch.setattr(open_clip_train.main, "train_one_epoch", train_one_epoch)
    with pytest.raises(UserError, match=r"open_clip_train\.main\.train_one_epoch"):
        find_trainer()


def test_another_form_of_batch_is_noticed(monkeypatch):
    import open_clip_train.main

    def train_one_epoch(model, data, loss, epoch):
        data["train"].set_epoch(epoch)
        dataloader = data["train"].dataloader
        for _, batch in enumerate(dataloader):
            model(batch["pictures"], dataloader.num_batches, dataloader.num_samples)

    monkeypatch.setattr(open_clip_train.main, "train_one_epoch", train_one_epoch)
    with pytest.raises(UserError, match="the batch that"):
        find_trainer()


PLAIN = """
def train_one_epoch(model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args, tb_writer=None):
    data["train"].set_epoch(epoch)
    dataloader = data["train"].dataloader
    for _, batch in enumerate(dataloader):
        images, texts = batch
        model(images, texts, dataloader.num_batches, dataloader.num_samples)

def get_data(args, preprocess_fns, epoch=0, tokenizer=None):
    return args.train_data
"""
TASK = """
def train_one_epoch(state, data, args, tb_writer=None):
    epoch, task = state.epoch, state.task
    data["train"].set_epoch(epoch)
    dataloader = data["train"].dataloader
    for _, batch in enumerate(dataloader):
        batch = task.prepare_batch(batch, dataloader.num_batches, dataloader.num_samples)

def get_data(args, preprocess_fns, epoch=0, tokenizer=None, {more}=None):
    return args.train_data
"""


@pytest.mark.parametrize(
    ("source", "about", "batch"),
    [
        (PLAIN, "a model, and batches of (images, texts)", ("i", "t")),
        (TASK.format(more="naflex_data_config"), "a task, and batches as mappings", {"image": "i", "text": "t"}),
        (TASK.format(more="model_traits"), "a task, and batches as mappings", {"image": "i", "text": "t"}),
    ],
)
def test_generations_of_the_trainer_are_told_apart(tmp_path, monkeypatch, source, about, batch):
    """By functions as 3.2, 3.3 and the development tree have them."""
    take(tmp_path, monkeypatch, source)
    seam = find_trainer().seam
    assert (seam.about, seam.form("i", "t")) == (about, batch)


def test_an_unknown_parameter_of_the_data_is_noticed(tmp_path, monkeypatch):
    for source in (TASK.format(more="news"), PLAIN.replace("tokenizer=None", "tokenizer=None, model_traits=None")):
        take(tmp_path, monkeypatch, source)
        with pytest.raises(UserError, match=r"parameter (news|model_traits) of get_data moved or changed"):
            find_trainer()


def take(folder, monkeypatch, source):
    """Give the trainer other functions."""
    import open_clip_train.main

    path, names = folder / f"trainer{len(list(folder.iterdir()))}.py", {}
    path.write_text(source)
    exec(compile(source, path, "exec"), names)
    for name in ("train_one_epoch", "get_data"):
        monkeypatch.setattr(open_clip_train.main, name, names[name])


def test_patches_are_refused():
    trainer = find_trainer()

    def parse_args(argv):
        return SimpleNamespace(**vars(trainer.parse_args(argv)), use_naflex=True)

    with pytest.raises(UserError, match=r"--use-naflex, or the model ViT-B-32, needs batches of patches"):
        parse(["--model", "ViT-B-32"], parse_args)


def test_a_lost_argument_is_named(monkeypatch):
    import open_clip_train.params

    whole = open_clip_train.params.parse_args

    def parse_args(argv):
        parsed = whole(argv)
        del parsed.save_most_recent
        return parsed

    monkeypatch.setattr(open_clip_train.params, "parse_args", parse_args)
    with pytest.raises(UserError, match="argument --save-most-recent"):
        find_trainer()


def test_a_missing_trainer_is_told_how_to_get(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip_train.main", None)
    with pytest.raises(UserError, match=r"pip install .*open.clip.torch"):
        find_trainer()
