"""Training on a GPU: bf16, images from worker processes through pinned memory, resumption with the same samples."""

import pytest
import torch

from tailwise.requests import TrainRequest
from tailwise.train.launch import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_run_on_cuda_resumes_with_the_same_samples(drawn_plan, tiny_model, tmp_path, read_record):
    words = [
        "--model",
        tiny_model,
        "--device",
        "cuda",
        "--precision",
        "amp_bf16",
        "--batch-size",
        "32",
        "--workers",
        "2",
    ]
    words += ["--lr", "1e-3", "--warmup", "4", "--log-every-n-steps", "1", "--logs", str(tmp_path / "logs"), "--name"]
    options = TrainRequest(epochs=1, checkpoint_every=8, record=tmp_path / "record")
    train(drawn_plan, [*words, "run"], options)
    (run,) = train(drawn_plan, [*words, "run"], TrainRequest(epochs=1, checkpoint_every=8, resume=True))
    assert run.found["finished"]
    seen = read_record(tmp_path / "record" / "run.rank-0.jsonl")
    train(drawn_plan, [*words, "again"], TrainRequest(epochs=1, checkpoint_every=8, record=tmp_path / "record"))
    again = read_record(tmp_path / "record" / "again.rank-0.jsonl")
    assert [(line["rows"], line["pixels"]) for line in seen] == [(line["rows"], line["pixels"]) for line in again]
    state = torch.load(run.folder / "checkpoints" / "epoch_latest.pt", map_location="cpu", weights_only=True)
    assert state["epoch"] == run.segments.count
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values() if value.is_floating_point())
