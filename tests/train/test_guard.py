import importlib.metadata

import pytest

from tailwise.errors import UserError
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
