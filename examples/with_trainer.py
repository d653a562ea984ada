"""CLIP training with Hugging Face's Trainer, on exactly the samples of each epoch.

usage: with_trainer.py POOL PLAN [--model ViT-B-32] [--batch 512] [--epochs 2] [--output run]
"""

import argparse

import open_clip
import torch
import transformers

import tailwise


class Clip(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.model, self.transform, _ = open_clip.create_model_and_transforms(name)

    def forward(self, image, text, row, epoch):
        loss = open_clip.ClipLoss()(*self.model(image, text))
        print(f"epoch {epoch[0]}: {len(row)} samples, loss {loss:.3f}")
        return {"loss": loss}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool"), parser.add_argument("plan")
    for name, value in {"model": "ViT-B-32", "batch": 512, "epochs": 2, "output": "run"}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    asked = parser.parse_args()
    model, collate = Clip(asked.model), torch.utils.data.default_collate
    plan = tailwise.Plan(tailwise.Catalog.open(asked.pool), asked.plan)
    reading = {"transform": model.transform, "tokenizer": open_clip.get_tokenizer(asked.model)}
    dataset = tailwise.EpochDataset(plan, batch_size=asked.batch, **reading)
    sizes = {"per_device_train_batch_size": asked.batch, "num_train_epochs": asked.epochs, "learning_rate": 5e-4}
    keeping = {"train_sampling_strategy": "sequential", "remove_unused_columns": False, "save_strategy": "no"}
    options = transformers.TrainingArguments(asked.output, **sizes, **keeping, report_to=[], dataloader_num_workers=2)
    transformers.Trainer(model, options, train_dataset=dataset, data_collator=collate).train()
