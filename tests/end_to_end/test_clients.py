"""The scripts in examples/ train from a plan with trainers that people have: each epoch is what the plan draws."""

import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tailwise.loader.dataset import BatchDataset
from tailwise.plan import Plan
from tailwise.requests import PlanRequest
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MODEL = f"local-dir:{ROOT / 'src/tailwise/demo/files/model'}"
SOAK = pytest.mark.skipif("TAILWISE_SOAK" not in os.environ, reason="minutes of starting processes: make soak runs it")
SHARDS, ROWS, BATCH = 3, 20, 16


@pytest.fixture(scope="module")
def pool(tmp_path_factory, make_tar, make_image):
    """A catalog of 60 samples with a plan of 29 in each epoch."""
    folder = tmp_path_factory.mktemp("clients")
    for shard in range(SHARDS):
        rows = range(shard * ROWS, (shard + 1) * ROWS)
        files = [(f"{row}.jpg", make_image(row, side=40), f"{row}.txt", f"thing {row}".encode()) for row in rows]
        make_tar(folder / "pool" / f"{shard:05d}.tar", [pair for four in files for pair in (four[:2], four[2:])])
    catalog = import_pool([str(folder / "pool")], folder / "catalog").catalog
    make_plan(catalog, "epochs", PlanRequest("random", budget=29, dynamic=True))
    return catalog


@pytest.fixture
def given(pool, tmp_path, monkeypatch):
    """Arguments of each script; it runs in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return [str(pool.folder), "epochs", "--model", MODEL, "--batch", str(BATCH)]


@pytest.fixture
def run(given, tmp_path, monkeypatch, capfd):
    """`run(script, *arguments)` → its output, and the (epoch, row) that were read; in this process, with workers of its own."""
    record, read = tmp_path / "record", BatchDataset.read

    def recorded(self, samples, positions):
        with record.open("a") as file:
            pairs = zip(samples.epochs.tolist(), samples.rows.tolist(), strict=True)
            file.write("".join(f"{epoch} {row}\n" for epoch, row in pairs))
        return read(self, samples, positions)

    def start(script, *arguments):
        monkeypatch.setattr(BatchDataset, "read", recorded)
        monkeypatch.setattr(sys, "argv", [script, *given, *arguments])
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        pairs = [tuple(map(int, line.split())) for line in record.read_text().splitlines()] if record.exists() else []
        return capfd.readouterr().out, Counter(pairs)

    return start


@pytest.fixture
def run_ranks(given, tmp_path):
    """`run_ranks(script, ranks, *arguments)` → the output of a run of that many processes."""

    def start(script, ranks, *arguments):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command = [*launcher, str(ROOT / "examples" / script), *given, *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return start


@pytest.fixture
def drawn(pool):
    """`drawn(epochs)` → the (epoch, row) that the plan draws."""
    plan = Plan(pool, "epochs")
    return lambda epochs: Counter(
        {(epoch, row): n for epoch in range(epochs) for row, n in enumerate(plan.draw(epoch).tolist()) if n}
    )


@pytest.mark.parametrize("script", ["with_accelerate.py", "with_lightning.py", "with_trainer.py"])
def test_a_trainer_reads_what_the_plan_draws(run, drawn, script):
    pytest.importorskip({"with_lightning.py": "lightning"}.get(script, "accelerate"))
    output, read = run(script)
    assert set(read) == set(drawn(2))
    assert script == "with_lightning.py" or read == drawn(2)  # Lightning begins some passes twice
    assert [int(size) for size in re.findall(r"(\d+) samples, loss \d", output)] == [16, 13, 16, 13]
    assert re.findall(r"epoch (\d)", output) == ["0", "0", "1", "1"]


@SOAK
def test_accelerate_shares_batches_among_ranks(run_ranks):
    output = run_ranks("with_accelerate.py", 2)
    assert re.findall(r"(\d+) samples", output) == ["8"] * 8


@SOAK
def test_ddp_goes_on_with_another_number_of_ranks(run_ranks):
    output = run_ranks("ddp.py", 2, "--epochs", "1")
    found = re.findall(r"rank (\d), epoch 0, batch 1: (\d+)", output)
    assert sorted(found) == [("0", "8"), ("1", "8")]
    found = re.findall(r"rank 0, epoch (\d), batch (\d+): (\d+)", run_ranks("ddp.py", 1, "--epochs", "3"))
    assert found == [("1", "2", "16"), ("1", "3", "16"), ("2", "4", "16"), ("2", "5", "16")]


def test_siglip(run):
    output, _ = run("siglip.py", "--epochs", "1")
    assert re.findall(r"epoch 0, batch (\d): 16 samples, loss \d", output) == ["1"]


def test_a_webdataset_pipeline(run, pool):
    output, _ = run("webdataset_pipeline.py", str(pool.folder.parent / "pool" / "{00000..00002}.tar"))
    sizes = re.findall(r"epoch (\d), batch \d+: (\d+) samples", output)
    assert [sum(int(size) for at, size in sizes if at == epoch) for epoch in "01"] == [29, 29]
