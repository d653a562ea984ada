"""CLIP training in a plain loop of torch's DistributedDataParallel, resumed after an interruption, also with another number of processes.

usage: torchrun --nproc-per-node 2 ddp.py POOL PLAN [--model ViT-B-32] [--batch 512] [--epochs 2] [--save run.pt]
"""

import argparse
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist

import tailwise

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool"), parser.add_argument("plan")
    for name, value in {"model": "ViT-B-32", "batch": 512, "epochs": 2, "save": "run.pt"}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    asked = parser.parse_args()
    dist.init_process_group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    plain, transform, _ = open_clip.create_model_and_transforms(asked.model)
    model, loss_of = torch.nn.parallel.DistributedDataParallel(plain), open_clip.ClipLoss(rank=rank, world_size=ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    plan = tailwise.Plan(tailwise.Catalog.open(asked.pool), asked.plan)
    reading = {"transform": transform, "tokenizer": open_clip.get_tokenizer(asked.model), "workers": 2}
    loader = tailwise.Loader(plan, batch_size=asked.batch // ranks, **reading)
    if Path(asked.save).exists():
        saved = torch.load(asked.save)
        plain.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
    for epoch in range(asked.epochs):
        for batch in loader.epoch(epoch):
            loss = loss_of(*model(batch.images, batch.texts))
            loss.backward(), optimizer.step(), optimizer.zero_grad()
            print(f"rank {rank}, epoch {epoch}, batch {loader.position}: {len(batch.rows)} samples, loss {loss:.3f}")
        if rank == 0:
            state = {"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
            torch.save(state, asked.save)
