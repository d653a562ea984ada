"""CLIP training with Hugging Face's accelerate, on exactly the samples of each epoch.

usage: accelerate launch with_accelerate.py POOL PLAN [--model ViT-B-32] [--batch 512] [--epochs 2]
"""

import argparse

import accelerate
import open_clip
import torch

import tailwise

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool")
    parser.add_argument("plan")
    for name, value in {"model": "ViT-B-32", "batch": 512, "epochs": 2}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    asked = parser.parse_args()
    # Ranks share each batch, so that it holds no sample twice. The last one of several ranks is filled up from the first.
    running = accelerate.Accelerator(dataloader_config=accelerate.DataLoaderConfiguration(split_batches=True))
    model, transform, _ = open_clip.create_model_and_transforms(asked.model)
    plan = tailwise.Plan(tailwise.Catalog.open(asked.pool), asked.plan)
    reading = {"transform": transform, "tokenizer": open_clip.get_tokenizer(asked.model)}
    dataset = tailwise.EpochDataset(plan, batch_size=asked.batch, **reading)
    batches = torch.utils.data.DataLoader(dataset, batch_size=asked.batch, shuffle=False, num_workers=2)
    model, optimizer, batches = running.prepare(model, torch.optim.AdamW(model.parameters(), lr=5e-4), batches)
    loss_of = open_clip.ClipLoss(rank=running.process_index, world_size=running.num_processes)
    for epoch in range(asked.epochs):
        batches.set_epoch(epoch)
        for number, batch in enumerate(batches):
            loss = loss_of(*model(batch["image"], batch["text"]))
            running.backward(loss), optimizer.step(), optimizer.zero_grad()
            print(f"epoch {batch['epoch'][0]}, batch {number}: {len(batch['row'])} samples, loss {loss:.3f}")
