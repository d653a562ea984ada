"""Training with the sigmoid loss of SigLIP: open_clip's model and loss, one process.

usage: siglip.py POOL PLAN [--model ViT-B-16-SigLIP] [--batch 512] [--epochs 2]
"""

import argparse

import open_clip
import torch
from open_clip.loss import SigLipLoss

import tailwise

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool")
    parser.add_argument("plan")
    for name, value in {"model": "ViT-B-16-SigLIP", "batch": 512, "epochs": 2}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    asked = parser.parse_args()
    model, transform, _ = open_clip.create_model_and_transforms(asked.model, init_logit_bias=-10)
    loss_of, optimizer = SigLipLoss(), torch.optim.AdamW(model.parameters(), lr=5e-4)
    plan = tailwise.Plan(tailwise.Catalog.open(asked.pool), asked.plan)
    reading = {"transform": transform, "tokenizer": open_clip.get_tokenizer(asked.model), "workers": 2}
    loader = tailwise.Loader(plan, batch_size=asked.batch, **reading)
    for epoch in range(asked.epochs):
        for batch in loader.epoch(epoch):
            loss = loss_of(*model(batch.images, batch.texts))
            loss.backward(), optimizer.step(), optimizer.zero_grad()
            print(f"epoch {epoch}, batch {loader.position}: {len(batch.rows)} samples, loss {loss:.3f}")
