"""The pages of Start and Guides: each command in a block marked `sh` runs as printed, in order, on a small made-up pool.

Two changes: K is at most 8, since the pool has 240 samples; the encoder `lite0` is `pixels`, since lite0 needs seconds to start. Blocks
without `sh` need a GPU, a cluster, a bucket or a download; tests/test_docs.py parses their commands.
"""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

import tailwise

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    path.relative_to(DOCS): blocks
    for path in sorted(DOCS.rglob("*.md"))
    if (blocks := re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
}
WORDS = ("a red fox", "two cups", "my new shoes", "an axolotl", "a fox and cups")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_tar, make_image, make_embeddings, make_metadata):
    """A folder of all that the pages read: shards, embeddings, metadata, lists. Five images of a shard are in the next one, too."""
    folder = tmp_path_factory.mktemp("docs")
    vectors = {}
    for shard in range(4):
        keys = [f"{shard:05d}{row:04d}" for row in range(60)]
        members = []
        for row, key in enumerate(keys):
            members += [(f"{key}.jpg", make_image(row + 55 * shard, side=24)), (f"{key}.txt", WORDS[row % 5].encode())]
            vectors[key] = np.random.default_rng(row + 55 * shard).normal(size=16).astype(np.float32)
        make_tar(folder / ("shards" if shard < 3 else "new-shards") / f"{shard:05d}.tar", members)
    make_embeddings(folder / "embeddings", {key: row for key, row in vectors.items() if key < "00003"})
    rows = np.stack([*vectors.values()]).astype(np.float16)
    uids = [f"{number:032x}" for number in range(len(rows))]
    urls = [f"https://example.org/{uid}.jpg" for uid in uids]
    make_metadata(folder / "metadata", "0", uids, {"l14_img": rows, "l14_txt": rows}, url=urls)
    (folder / "concepts.txt").write_text("fox\ncups\nshoes\naxolotl\n")
    (folder / "opted-out.txt").write_text("000000001\n000010002\n")
    return folder


@pytest.fixture(scope="module")
def pool(sources, run_tailwise):
    """The catalog of pages that begin with one: clusterings `fine` and `main`, drop list `duplicates`, plan `epochs`."""
    catalog = sources.parent / "pool-of-docs"
    run_tailwise("import", sources / "shards", catalog)
    run_tailwise("embed", catalog, "--encoder", "pixels")
    run_tailwise("cluster", catalog, "--k", 8, "--name", "fine")
    run_tailwise("dedup", catalog, "--clustering", "fine", "--epsilon", 0.05)
    run_tailwise("cluster", catalog, "--k", 8, "--without", "duplicates")
    run_tailwise("plan", catalog, "epochs", "--method", "dynamics", "--keep", 0.5, "--without", "duplicates")
    return catalog


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_run_as_printed(page, sources, pool, run_tailwise, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in sources.iterdir():
        (tmp_path / source.name).symlink_to(source)
    lines = "".join(PAGES[page]).splitlines()
    if not lines[0].startswith(("tailwise import shards/", "tailwise import metadata/")):
        shutil.copytree(pool, tmp_path / "pool")
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        assert program == "tailwise", line
        run_tailwise(*small(words))


YOURS = """
import itertools, numpy, torch
def transform(image):
    return torch.tensor(numpy.asarray(image.resize((8, 8)))) / 255
def tokenizer(captions):
    return torch.tensor([[len(caption)] for caption in captions])
def step(images, texts):
    assert len(images) == len(texts) and images.shape[1:] == (8, 8, 3)
    seen.append(len(images))
time_to_save = itertools.cycle([True, False]).__next__
seen = []
"""


@pytest.mark.parametrize("page", ["pytorch-loop", "other-trainers"])
def test_python_of_the_loops_runs(page, pool, tmp_path, monkeypatch):
    """With functions of the reader made up, small batches, and no worker processes."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pool, tmp_path / "pool")
    (code, *_) = re.findall(r"^```python\n(.*?)^```", (DOCS / "guides" / f"{page}.md").read_text(), re.M | re.S)
    names = {"__name__": "__main__", "plan": tailwise.Plan("pool", "epochs"), "tailwise": tailwise}
    exec(YOURS + re.sub(r"workers=8", "workers=0", code.replace("batch_size=512", "batch_size=16")), names)
    drawn = sum(names["plan"].draw(epoch).sum() for epoch in range(6))
    assert drawn - 16 < sum(names["seen"]) <= drawn


def small(words):
    """Return the words of a command with a smaller K and an encoder that starts at once."""
    values = {"--k": lambda k: str(min(int(k), 8)), "--encoder": lambda name: "pixels" if name == "lite0" else name}
    return [values.get(before, lambda same: same)(word) for before, word in zip(["", *words[:-1]], words, strict=True)]
