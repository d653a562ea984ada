"""A tiny CLIP trained on the shared pool through open_clip's own trainer (`tailwise train --recipe tiny-cpu`), and its zero-shot accuracy.

    python benchmarks/train_tiny.py [--samples-seen 320000] [--keep 0.5] [--method dynamics] [--seed 0] [--shared ../shared/data]

Prints samples/s, the share of time that the trainer waited for data, the loss along the way, and top-1 accuracy on the validation set
(templates averaged, as open_clip does), over all classes and by thirds of training frequency. Chance is 1 / classes.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from common import print_header
from PIL import Image

import tailwise
from tailwise.recipes import load_recipe
from tailwise.requests import ClusterRequest


def zero_shot(model_folder, checkpoint, data):
    """Accuracy of each class, float64 [classes]."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model_folder}")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    model.eval()
    classes = (data / "classnames.txt").read_text().splitlines()
    templates = (data / "zeroshot_classification_templates.txt").read_text().splitlines()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_folder}")
    classifier = open_clip.build_zero_shot_classifier(
        model, tokenizer, classes, [lambda name, text=text: text.replace("{c}", name) for text in templates]
    )
    right, seen = np.zeros(len(classes)), np.zeros(len(classes))
    for path in sorted((data / "test").glob("*.tar")):
        images, labels = [], []
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if member.name.endswith(".cls"):
                    labels.append(int(content.read()))
                else:
                    images.append(preprocess(Image.open(content)))
        with torch.no_grad():
            features = [model.encode_image(torch.stack(part), normalize=True) for part in _parts(images, 500)]
        found = (torch.cat(features) @ classifier).argmax(1).numpy()
        np.add.at(right, labels, found == np.array(labels))
        np.add.at(seen, labels, 1)
    return right / seen


def _parts(items, size):
    return (items[start : start + size] for start in range(0, len(items), size))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--samples-seen", type=int, default=load_recipe("tiny-cpu").phases[0].samples_seen)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--method", default="dynamics")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print_header(__doc__.splitlines()[0], "torch", "open_clip_torch")
    pool = options.shared / "tinyimagenet-lt"
    with tempfile.TemporaryDirectory() as folder:
        catalog = tailwise.import_pool([str(pool / "train"), str(pool / "embeddings")], f"{folder}/pool").catalog
        tailwise.cluster(catalog, ClusterRequest(k=400, merge=0.7))
        tailwise.make_plan(catalog, "plan", tailwise.PlanRequest(options.method, keep=options.keep, seed=options.seed))
        command = [sys.executable, "-m", "tailwise", "train", str(catalog.folder), "plan", "--recipe", "tiny-cpu"]
        command += ["--samples-seen", str(options.samples_seen), "--", "--logs", folder, "--name", "run"]
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        run = Path(folder, "run")
        checkpoint = run / "checkpoints" / "epoch_latest.pt"
        steps = re.findall(
            r"Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+), ([\d.e+]+)/s.* Loss: ([\d.]+)", (run / "out.log").read_text()
        )
        data, batch, _, loss = (np.array(column, float) for column in zip(*steps, strict=True))
        of_class = zero_shot(_model_folder(), checkpoint, options.shared / "tinyimagenet-val")
    print(
        f"{options.method}, keep {options.keep}, seed {options.seed}: {options.samples_seen:,} samples seen in {seconds:.0f} s"
    )
    waits = f"{data.sum() / batch.sum():.0%} of a step waits for data"
    print(f"{options.samples_seen / seconds:,.0f} samples/s with start-up and checkpoints; {waits}")
    marks = np.linspace(0, len(loss) - 1, 8).round().astype(int)
    print("loss " + " → ".join(f"{loss[at]:.2f}" for at in marks))
    lines = (pool / "classes.tsv").read_text().splitlines()[1:]
    frequency = np.array([int(line.split("\t")[3]) for line in lines])
    thirds = np.array_split(np.argsort(-frequency, kind="stable"), 3)
    groups = ", ".join(
        f"{name} {of_class[third].mean():.1%}" for name, third in zip(("head", "medium", "few"), thirds, strict=True)
    )
    print(f"zero-shot top-1 {of_class.mean():.1%} ({groups}); chance {1 / len(of_class):.1%}")


def _model_folder():
    return load_recipe("tiny-cpu").phases[0].open_clip["model"].removeprefix("local-dir:")


if __name__ == "__main__":
    main()
