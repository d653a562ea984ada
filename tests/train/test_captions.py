"""Several captions a sample, in training: each batch has the captions that its draws name, and a resumption needs the same."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tailwise.loader.captions import CaptionMix
from tailwise.requests import CaptionsRequest
from tailwise.steps.importing.captions import join_captions


@pytest.fixture(scope="module")
def recaptioned(drawn_plan, tmp_path_factory):
    """`drawn_plan`, whose catalog has captions "recap" of its first 1,000 samples."""
    path = tmp_path_factory.mktemp("recap") / "recap.parquet"
    samples = drawn_plan.catalog.samples(drawn_plan.catalog.parts()[0], ["uid"]).slice(0, 1000)
    uids = [uid.hex() for uid in samples["uid"].to_pylist()]
    pq.write_table(pa.table({"uid": uids, "caption": [f"recap {uid[:8]}" for uid in uids]}), path)
    join_captions(drawn_plan.catalog, [path], CaptionsRequest(name="recap"))
    return drawn_plan


def test_a_training_uses_and_records_the_captions(recaptioned, tiny_model, tmp_path, run_tailwise, read_record):
    import open_clip

    from tailwise.train.data import checksum

    settings = {"model": tiny_model, "device": "cpu", "precision": "fp32", "workers": 0, "lr": 1e-3, "warmup": 1}
    content = {**dict.fromkeys(("name", "about", "source", "command", "plan"), "x"), "expect": {}}
    content["phases"] = [
        {"samples_seen": 192, "global_batch": 32, "captions": {"recap": 1, "original": 1}, "open_clip": settings}
    ]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    command = [
        "train",
        recaptioned.catalog.folder,
        "epochs",
        "--recipe",
        tmp_path / "r.yaml",
        "--record",
        tmp_path / "record",
    ]
    after = ["--", "--logs", tmp_path / "logs", "--name", "run", "--report-to", ""]
    assert (
        "captions: original 0.5, recap 0.5; samples that lack one" in run_tailwise(*command, "--dry-run", *after).stdout
    )
    assert "draws of rank 0 had samples without the caption that was drawn" in run_tailwise(*command, *after).stderr

    mix = CaptionMix(recaptioned.catalog, {"original": 0.5, "recap": 0.5}, recaptioned.config["seed"])
    own = recaptioned.catalog.samples(recaptioned.catalog.parts()[0], ["caption"])["caption"].to_pylist()
    tokenizer = open_clip.get_tokenizer(tiny_model)
    lines = read_record(tmp_path / "record" / "run.rank-0.jsonl")
    assert len(lines) == 6
    for line in lines:
        rows = torch.tensor(line["rows"]).numpy()
        chosen = mix.of(rows, torch.tensor(line["epochs"], dtype=torch.int32).numpy())
        assert line["captions"] == chosen.names
        texts = [text or own[row] for row, text in zip(rows, chosen.texts, strict=True)]
        assert line["texts"] == checksum(tokenizer(texts))
    assert {name for line in lines for name in line["captions"]} == {"recap", "original"}

    refused = run_tailwise(*command, "--captions", "recap:0.9,original:0.1", "--resume", *after, code=2)
    assert (
        "can't be resumed with other settings (captions.original 0.5 → 0.1; captions.recap 0.5 → 0.9)" in refused.stderr
    )
    refused = run_tailwise(*command, "--captions", "reca", *after, code=2)
    assert "no captions named 'reca'" in refused.stderr
