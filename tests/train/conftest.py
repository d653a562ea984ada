"""A small pool of drawings with a plan, a model of two layers, and open_clip's trainer in processes of its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tailwise.catalog import Catalog
from tailwise.demo.pool import make_pool
from tailwise.plan import Plan
from tailwise.requests import PlanRequest
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan

pytest.importorskip("open_clip_train.main", reason="open_clip's trainer isn't installed")

MAIN = "from tailwise.cli import main; main()"


@pytest.fixture(scope="session")
def drawn_plan(tmp_path_factory):
    """Plan "epochs": 800 of 1,600 drawings of 32 pixels, drawn anew each epoch."""
    folder = tmp_path_factory.mktemp("train")
    make_pool(folder / "pool", images=1600, concepts=32, shards=4, size_px=32)
    catalog = import_pool([str(folder / "pool")], folder / "catalog", workers=1).catalog
    make_plan(catalog, "epochs", PlanRequest("random", keep=0.5))
    return Plan(Catalog.open(folder / "catalog"), "epochs")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """`--model` of a CLIP with two layers a tower, which drops half of the patches at random while it trains."""
    folder = tmp_path_factory.mktemp("model")
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2, "patch_dropout": 0.5}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def launch_train():
    """`launch_train(arguments, log)` starts `tailwise train` in two ranks by torch's launcher → Popen."""

    def start(arguments, log):
        # The launcher listens on a free port of its own; threads are bounded, since ranks share the machine.
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [sys.executable, *launcher, "-m", "tailwise", "train", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("w") as stream:
            return subprocess.Popen(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )

    return start


LAUNCHED = """
from tailwise.cli import main
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def rank():
    try:
        main()
    except SystemExit as end:
        assert not end.code

place = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test"}
elastic_launch(LaunchConfig(1, 1, 2, start_method="fork", **place), rank)()
"""


@pytest.fixture(scope="session")
def fork_launcher(fork_python):
    """`fork_launcher(arguments, log)` starts `tailwise train` in two ranks by torch's launcher, all of them forks → the launcher."""

    def start(arguments, log):
        return fork_python(LAUNCHED, "train", *arguments, out=log)

    return start


@pytest.fixture(scope="session")
def fork_train(fork_python):
    """`fork_train(arguments, log, ranks=1, code=MAIN)` starts `tailwise train` as so many ranks → their processes."""

    def start(arguments, log, ranks=1, code=MAIN):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        return [
            fork_python(code, "train", *arguments, out=log, **number, **(size and place | size))
            for number in ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if size else {} for rank in range(ranks))
        ]

    return start


@pytest.fixture(scope="session")
def read_record():
    """`read_record(path)` → the lines of a record, in order."""

    def read(path):
        return [json.loads(line) for line in Path(path).read_text().splitlines()]

    return read
