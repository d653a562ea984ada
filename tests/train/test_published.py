"""Four things that others publish, on a download that lacks 5 % of their samples: read, written back, and trained on after a kill."""

import hashlib
import json
import signal
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.catalog import Catalog
from tailwise.demo.pool import make_pool
from tailwise.plan import Plan

IMAGES, BATCHES, SEGMENT, LAST = 640, 24, 4, 6
KILLED = """
import os, signal
from tailwise.cli import main
from tailwise.train.data import Record

add = Record.add

def killed(self, segment, number, batch):
    add(self, segment, number, batch)
    if number == {last}:
        os.kill(os.getpid(), signal.SIGKILL)

Record.add = killed
main()
"""


class Published:
    """The pool of the publishers: `keys`, their `uid` and `sha256`, those that the download lacks (`lost`), and the catalogs."""

    def __init__(self, folder):
        self.folder, self.theirs, self.ours = folder, folder / "theirs", folder / "ours"
        self.samples = {}
        for path in sorted((folder / "drawn").glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, kind = member.name.partition(".")
                    self.samples.setdefault(key, {})[kind] = tar.extractfile(member).read()
        self.keys = sorted(self.samples)
        self.uid = {key: hashlib.md5(key.encode()).hexdigest() for key in self.keys}
        self.sha256 = {key: hashlib.sha256(self.samples[key]["jpg"]).hexdigest() for key in self.keys}
        self.lost = {*self.keys[7::20]}

    def members(self, keys):
        for key in keys:
            about = {"key": key, "uid": self.uid[key], "sha256": self.sha256[key], "url": f"https://x/{key}"}
            yield from ((f"{key}.{kind}", self.samples[key][kind]) for kind in ("jpg", "txt"))
            yield f"{key}.json", json.dumps(about).encode()

    def draw(self, catalog, name, epoch):
        """{key: copies} of an epoch."""
        plan = Plan(Catalog.open(catalog), name)
        parts = plan.catalog.parts(plan.snapshot)
        keys = [key for part in parts for key in plan.catalog.samples(part, ["key"]).column(0).to_pylist()]
        return {keys[row]: int(copies) for row, copies in enumerate(plan.draw(epoch)) if copies}


@pytest.fixture(scope="module")
def published(tmp_path_factory, make_tar, run_tailwise):
    """The publishers' pool with a plan in it; and our tars and catalog: in another order, with 5 % missing."""
    folder = tmp_path_factory.mktemp("published")
    make_pool(folder / "drawn", images=IMAGES, concepts=16, shards=4, size_px=32)
    made = Published(folder)
    generator = np.random.default_rng(1)
    for name, keys, shards in (("theirs", made.keys, 4), ("ours", [*{*made.keys} - made.lost], 3)):
        order = generator.permutation(sorted(keys)).tolist()
        for shard, mine in enumerate(np.array_split(order, shards)):
            make_tar(folder / "tars" / name / f"{shard:05d}.tar", list(made.members(mine.tolist())))
        run_tailwise("import", folder / "tars" / name, folder / name, "--workers", 1)
    groups = [f"{key},{'abcd'[int(hashlib.md5(key.encode()).hexdigest(), 16) % 10 // 3]}" for key in made.keys]
    (folder / "groups.csv").write_text("\n".join(["key,kind", *groups]))
    run_tailwise("group", made.theirs, "--by", "kind", "--file", folder / "groups.csv")
    wanted = ["--method", "dynamics", "--clustering", "kind", "--keep", 0.4, "--seed", 3]
    run_tailwise("plan", made.theirs, "epochs", *wanted)
    run_tailwise("export", made.theirs, "epochs", "--to", "plan-bundle", "--output", folder / "bundle")
    return made


def test_a_list_of_uids_comes_back_less_what_is_missing(published, run_tailwise, tmp_path):
    listed = published.keys[::3]
    halves = sorted((int(published.uid[key][:16], 16), int(published.uid[key][16:], 16)) for key in listed)
    np.save(tmp_path / "dfn_2b_inds.npy", np.array(halves, "u8,u8"))
    here = [key for key in listed if key not in published.lost]
    assert len(here) < len(listed)
    filtered = ["filter", published.ours, "--only", tmp_path / "dfn_2b_inds.npy", "--name", "dfn", "--strict"]
    told = run_tailwise(*filtered, 0.9).stdout
    assert f"{len(here)} of {len(listed)} names" in told and "by uid" in told
    run_tailwise(
        "plan", published.ours, "dfn", "--method", "random", "--without", "dfn", "--budget", len(here), "--static"
    )
    run_tailwise("export", published.ours, "dfn", "--to", "datacomp", "--output", tmp_path / "back.npy")
    back = np.load(tmp_path / "back.npy")
    assert back.dtype == np.dtype("u8,u8")
    assert {f"{high:016x}{low:016x}" for high, low in back.tolist()} == {published.uid[key] for key in here}
    refused = run_tailwise(*filtered, 0.999, code=2)
    assert "0.999" in refused.stderr


def test_rates_by_sha256_come_back_less_what_is_missing(published, run_tailwise, tmp_path):
    rates = {published.sha256[key]: (1 + number % 9) / 10 for number, key in enumerate(published.keys)}
    (tmp_path / "probabilities.json").write_text(json.dumps(rates))
    words = ["--method", "rates", "--rates", tmp_path / "probabilities.json"]
    told = run_tailwise("plan", published.ours, "dynamics", *words).stdout
    assert "by sha256" in told and f"{IMAGES - len(published.lost)} of {IMAGES} names" in told
    run_tailwise("export", published.ours, "dynamics", "--to", "rates-json", "--output", tmp_path / "back.json")
    back = json.loads((tmp_path / "back.json").read_text())
    assert back == pytest.approx(
        {key: rates[published.sha256[key]] for key in published.keys if key not in published.lost}
    )


def test_scores_of_a_file_keep_the_highest_of_what_is_there(published, run_tailwise, tmp_path):
    scores = dict(zip(published.keys, np.random.default_rng(2).random(IMAGES).round(6).tolist(), strict=True))
    table = {"uid": [published.uid[key] for key in published.keys], "quality": [scores[key] for key in published.keys]}
    pq.write_table(pa.table(table), tmp_path / "scores.parquet")
    words = ["filter", published.ours, "--by", "quality", "--file", tmp_path / "scores.parquet", "--keep", 0.25]
    run_tailwise(*words)
    run_tailwise(
        "plan", published.ours, "best", "--method", "random", "--without", "quality", "--budget", 152, "--static"
    )
    here = [key for key in published.keys if key not in published.lost]
    assert published.draw(published.ours, "best", 0).keys() == {*sorted(here, key=scores.get)[-len(here) // 4 :]}
    run_tailwise("export", published.ours, "best", "--to", "keys", "--output", tmp_path / "keys.txt")
    assert {*(tmp_path / "keys.txt").read_text().split()} == {*sorted(here, key=scores.get)[-len(here) // 4 :]}


def test_a_plan_bundle_comes_back_less_what_is_missing(published, run_tailwise, tmp_path):
    told = run_tailwise("plan", published.ours, "shared", "--from", published.folder / "bundle").stdout
    assert "missing" in told
    for epoch in range(3):
        theirs = published.draw(published.theirs, "epochs", epoch)
        assert published.draw(published.ours, "shared", epoch) == {
            key: copies for key, copies in theirs.items() if key not in published.lost
        }
    run_tailwise("export", published.ours, "shared", "--to", "plan-bundle", "--output", tmp_path / "again")
    first, again = (
        {
            row["uid"]: (row["sha256"], row["url"], row["rate"])
            for row in pq.read_table(path / "plan.parquet").to_pylist()
        }
        for path in (published.folder / "bundle", tmp_path / "again")
    )
    lost = {published.uid[key] for key in published.lost}
    assert again == {uid: about for uid, about in first.items() if uid not in lost}


@pytest.mark.parametrize("kind", ["list", "bundle"])
def test_a_killed_training_on_the_same_tars_trains_on_the_plan(
    published, kind, run_tailwise, fork_train, read_record, tiny_model, tmp_path
):
    listed, name = published.keys[1::2], f"trained-{kind}"
    if kind == "list":
        (tmp_path / "listed.txt").write_text("\n".join(published.uid[key] for key in listed))
        run_tailwise("filter", published.ours, "--only", tmp_path / "listed.txt", "--name", "listed")
        run_tailwise("plan", published.ours, name, "--method", "random", "--without", "listed", "--budget", 200)
    else:
        run_tailwise("plan", published.ours, name, "--from", published.folder / "bundle")
    words = [published.ours, name, "--samples-seen", 32 * BATCHES]
    words += ["--checkpoint-every", SEGMENT, "--record", tmp_path / "record"]
    trainer = ["--model", tiny_model, "--device", "cpu", "--precision", "fp32", "--batch-size", 32, "--workers", 1]
    trainer = ["--", *trainer, "--warmup", 2, "--lr", "1e-3", "--logs", tmp_path, "--name", "run"]
    log, record = tmp_path / "log", tmp_path / "record" / "run.rank-0.jsonl"
    (process,) = fork_train([*words, *trainer], log, code=KILLED.format(last=LAST))
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, log.read_text()[-5000:]
    assert len(read_record(record)) == LAST + 1
    (process,) = fork_train([*words, "--resume", *trainer], log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()[-5000:]
    lines = {line["batch"]: line for line in read_record(record)}
    assert len(read_record(record)) > len(lines) == BATCHES and not any(line["replaced"] for line in lines.values())

    plan, seen = Plan(Catalog.open(published.ours), name), {}
    for number in range(BATCHES):
        for epoch, row in zip(lines[number]["epochs"], lines[number]["rows"], strict=True):
            seen.setdefault(epoch, Counter())[row] += 1
    *whole, _, last = sorted(seen)  # some samples of an epoch come in the first block of the next one
    assert whole == [*range(last - 1)] and last >= 3
    for epoch, rows in seen.items():
        drawn = Counter({row: int(copies) for row, copies in enumerate(plan.draw(epoch)) if copies})
        assert rows == drawn if epoch in whole else rows <= drawn
    for epoch in whole:
        trained = published.draw(published.ours, name, epoch)
        if kind == "list":
            assert trained.keys() <= {*listed} - published.lost and sum(trained.values()) == 200
        else:
            theirs = published.draw(published.theirs, "epochs", epoch)
            assert trained == {key: copies for key, copies in theirs.items() if key not in published.lost}
