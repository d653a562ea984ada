"""CLIP training from a webdataset pipeline, with one stage that keeps the samples of an epoch.

usage: webdataset_pipeline.py POOL PLAN SHARDS [--model ViT-B-32] [--batch 512] [--epochs 2]
"""

import argparse

import open_clip
import torch
import webdataset

import tailwise
from tailwise.loader.webdataset import select

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pool", "plan", "shards"):
        parser.add_argument(name)
    for name, value in {"model": "ViT-B-32", "batch": 512, "epochs": 2}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    asked = parser.parse_args()
    model, transform, _ = open_clip.create_model_and_transforms(asked.model)
    tokenizer, loss_of = open_clip.get_tokenizer(asked.model), open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    stage = select(tailwise.Plan(tailwise.Catalog.open(asked.pool), asked.plan))
    samples = webdataset.WebDataset(asked.shards, shardshuffle=100).compose(stage).shuffle(5000).decode("pilrgb")
    pairs = samples.to_tuple("jpg;png;webp", "txt").map_tuple(transform, lambda caption: tokenizer([caption])[0])
    batches = torch.utils.data.DataLoader(pairs.batched(asked.batch), batch_size=None, num_workers=2)
    for epoch in range(asked.epochs):
        stage.set_epoch(epoch)
        for number, (images, texts) in enumerate(batches):
            loss = loss_of(*model(images, texts))
            loss.backward(), optimizer.step(), optimizer.zero_grad()
            print(f"epoch {epoch}, batch {number}: {len(images)} samples, loss {loss:.3f}")
