"""CLIP training with Lightning. usage: with_lightning.py POOL PLAN [--model ViT-B-32] [--batch 512] [--epochs 2]"""

import argparse

import lightning
import open_clip
import torch

import tailwise


class Clip(lightning.LightningModule):
    def __init__(self, asked):
        super().__init__()
        self.model, transform, _ = open_clip.create_model_and_transforms(asked.model)
        plan = tailwise.Plan(tailwise.Catalog.open(asked.pool), asked.plan)
        reading = {"transform": transform, "tokenizer": open_clip.get_tokenizer(asked.model)}
        self.dataset, self.batch = tailwise.EpochDataset(plan, batch_size=asked.batch, **reading), asked.batch

    def train_dataloader(self):
        self.dataset.set_epoch(self.trainer.current_epoch)
        return torch.utils.data.DataLoader(self.dataset, batch_size=self.batch, shuffle=False, num_workers=2)

    def training_step(self, batch, number):
        loss = open_clip.ClipLoss()(*self.model(batch["image"], batch["text"]))
        print(f"epoch {batch['epoch'][0]}, batch {number}: {len(batch['row'])} samples, loss {loss:.3f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool"), parser.add_argument("plan")
    for name, value in {"model": "ViT-B-32", "batch": 512, "epochs": 2}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    asked = parser.parse_args()
    lightning.Trainer(max_epochs=asked.epochs, reload_dataloaders_every_n_epochs=1, logger=False).fit(Clip(asked))
