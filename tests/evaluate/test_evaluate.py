"""Evaluation from end to end, with a tiny CLIP of random weights; clip_benchmark's own code on the same files says what is right."""

import csv
import functools
import gzip
import http.server
import io
import json
import lzma
import re
import shutil
import tarfile
import threading

import numpy as np
import pytest
from typer.testing import CliRunner

from tailwise.cli import app
from tailwise.encoders.open_clip import find_checkpoint, load_model
from tailwise.errors import UserError
from tailwise.evaluate.output import write_output
from tailwise.evaluate.run import evaluate, mean_over_sets
from tailwise.requests import EvaluateRequest
from tailwise.steps.importing.pool import import_pool

open_clip = pytest.importorskip("open_clip", reason="open_clip isn't installed")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def measure(tiny_checkpoint, tiny_model):
    """`measure(data, **options)` evaluates the tiny checkpoint, in this process unless told otherwise."""

    def run(data, **options):
        chosen = {"model": tiny_model, "workers": 1, "bootstrap": 50, "device": "cpu", **options}
        return evaluate(tiny_checkpoint, data, EvaluateRequest(**chosen))

    return run


@pytest.fixture
def peer(tiny_checkpoint, tiny_model, monkeypatch):
    """clip_benchmark's figures of the tiny checkpoint on a set in its layout."""
    pytest.importorskip("clip_benchmark", reason="clip_benchmark isn't installed")
    from clip_benchmark.datasets.builder import build_dataset, image_captions_collate_fn
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    model, _, transform = open_clip.create_model_and_transforms(tiny_model)
    open_clip.load_checkpoint(model, str(tiny_checkpoint))
    tokenizer = open_clip.get_tokenizer(tiny_model)

    def accuracy(output, target, topk=(1,)):
        """clip_benchmark 1.6's, but for its last step, which NumPy 2.4 refuses: float(array of one number)."""
        pred = output.topk(max(topk), 1, True, True)[1].t()
        correct = pred.eq(target.view(1, -1).expand_as(pred))
        return [float(correct[:k].reshape(-1).float().sum(0, keepdim=True).item()) / len(target) for k in topk]

    monkeypatch.setattr(zeroshot_classification, "accuracy", accuracy)

    def run(folder, task, batch_size=16):
        dataset = build_dataset("wds/x", root=str(folder), transform=transform, download=False, task=f"zeroshot_{task}")
        collate = {"collation_fn": image_captions_collate_fn} if task == "retrieval" else {}
        loader = torch.utils.data.DataLoader(dataset.batched(batch_size, **collate), batch_size=None)
        if task == "retrieval":
            return zeroshot_retrieval.evaluate(
                model.eval(), loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
            )
        return zeroshot_classification.evaluate(
            model.eval(), loader, tokenizer, dataset.classes, dataset.templates, "cpu", amp=False
        )

    return run


def texts_of(count):
    """One to three texts for each image; some stand for two images."""
    words = ["red", "blue", "square", "round", "small", "old", "wet", "far"]
    random = np.random.default_rng(4)
    return [[" ".join(random.choice(words, 2)) + f" {i % 17}" for _ in range(1 + i % 3)] for i in range(count)]


def test_classification_is_clip_benchmarks_to_the_last_digit(measure, peer, classification_set):
    (ours,) = measure(classification_set)
    theirs = peer(classification_set, "classification")
    assert ours.summary["top1"]["value"] == theirs["acc1"]
    assert ours.summary["top5"]["value"] == theirs["acc5"]
    assert ours.summary["mean_per_class"]["value"] == pytest.approx(theirs["mean_per_class_recall"], abs=1e-15)
    assert 0.05 < theirs["acc1"] < 0.95  # neither can be had by chance


def test_retrieval_is_clip_benchmarks(measure, peer, make_retrieval, tmp_path):
    folder = make_retrieval(tmp_path / "retrieval", texts_of(60))
    (ours,) = measure(folder)
    theirs = peer(folder, "retrieval")
    for name in ("image_retrieval", "text_retrieval"):
        for k in (1, 5, 10):
            assert ours.summary[name][str(k)]["value"] == pytest.approx(
                theirs[f"{name}_recall@{k}"], abs=1e-7
            )  # float32
    assert (ours.summary["images"], ours.summary["texts"]) == (60, 120)
    assert ours.classes is None
    assert mean_over_sets([ours]) == {"mean_recall@1": ours.summary["mean_recall"]["1"]["value"]}


def test_workers_don_t_matter(measure, classification_set, make_retrieval, tmp_path):
    retrieval = make_retrieval(tmp_path / "retrieval", texts_of(30))
    one, two = (measure([classification_set, retrieval], workers=workers, batch_size=7) for workers in (1, 2))
    assert [item.summary for item in one] == [item.summary for item in two]
    assert one[0].classes.equals(two[0].classes)


def test_all_layouts_say_the_same(measure, classification_set, tmp_path, labels, class_names, make_picture):
    (tmp_path / "names").write_text("\n".join(class_names))
    templates = classification_set / "zeroshot_classification_templates.txt"
    for i, label in enumerate(labels):
        folder = tmp_path / "folders" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.png").write_bytes(make_picture(i))
    (tmp_path / "folders" / "5").mkdir()
    tars = f"file://{classification_set}/test/{{0..2}}.tar"
    options = {"classes": tmp_path / "names", "templates": templates}
    (whole,) = measure(classification_set)
    for data in (tmp_path / "folders", tars, str(classification_set / "test")):
        (found,) = measure(data, **options)
        assert {**found.summary, "set": "pictures"} == whole.summary
        assert found.classes.equals(whole.classes)


@pytest.mark.parametrize("workers", [1, 2])
def test_sets_are_read_over_http(measure, classification_set, workers):
    pytest.importorskip("aiohttp")
    handler = functools.partial(QuietHandler, directory=classification_set.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        (found,) = measure(f"{address}/{classification_set.name}/", workers=workers)
        with pytest.raises(UserError, match="is no set"):
            measure(f"{address}/absent")
        server.shutdown()
    (local,) = measure(classification_set)
    assert found.summary == local.summary


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_groups_follow_the_training_counts(measure, classification_set, tmp_path, labels):
    counts = [3, 900, 40, 0, 200, 40]
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    (thirds,) = measure(classification_set, train_counts=tmp_path / "counts.json")
    rows = thirds.classes.to_pylist()
    assert [row["group"] for row in rows] == ["few", "head", "medium", "few", "head", "medium"]
    assert [row["train_count"] for row in rows] == counts
    assert [row["images"] for row in rows] == [labels.count(c) for c in range(6)]
    assert rows[5]["accuracy"] is None
    for name, group in thirds.summary["groups"].items():
        mine = [row["accuracy"] for row in rows if row["group"] == name and row["images"]]
        assert group["accuracy"]["value"] == pytest.approx(np.mean(mine))
        assert group["images"] == sum(row["images"] for row in rows if row["group"] == name)
    seen = [row for row in rows if row["images"]]
    line = np.polyfit([np.log2(max(row["train_count"], 1)) for row in seen], [row["accuracy"] for row in seen], 1)
    trend = thirds.summary["trend"]
    assert trend["slope_per_doubling"]["value"] == pytest.approx(line[0], abs=1e-12)
    assert trend["correlation"].keys() == {"value", "low", "high"}
    assert trend["classes"] == len(seen)
    assert trend["never_seen"] == sum(row["train_count"] == 0 for row in seen)
    assert measure(classification_set)[0].summary["trend"] is None
    assert [(b["from"], b["to"], b["classes"]) for b in thirds.summary["curve"]] == [
        (0, 0, 1), (2, 3, 1), (32, 63, 2), (128, 255, 1), (512, 1023, 1)
    ]  # fmt: skip
    (bounded,) = measure(classification_set, train_counts=tmp_path / "counts.json", groups="100,20")
    assert bounded.classes["group"].to_pylist() == ["few", "head", "medium", "few", "head", "medium"]
    (other,) = measure(classification_set, train_counts=tmp_path / "counts.json", groups="1000,1000")
    assert other.summary["groups"]["head"] == {
        "classes": 0, "classes_with_images": 0, "images": 0, "accuracy": {"value": None, "low": None, "high": None}
    }  # fmt: skip


def test_a_pool_gives_the_counts(measure, classification_set, small_catalog, tmp_path):
    (tmp_path / "names").write_text("group 0\ngroup 1, nothing\nabsent\ngroup 3\ngroup 4\ngroup 11\n")
    (found,) = measure(classification_set, classes=tmp_path / "names", pool=small_catalog.folder)
    assert found.classes["train_count"].to_pylist() == [193, 97, 0, 48, 39, 17]


def test_what_can_t_be_used_is_counted(measure, tmp_path, make_tar, make_picture):
    def write(folder, more):
        good = [m for i in range(9) for m in ((f"g{i}.png", make_picture(i)), (f"g{i}.cls", f" {i % 2}\n".encode()))]
        make_tar(folder / "0.tar", good + more)
        (folder / "classnames.txt").write_text("cat\nreel\n")
        return folder

    bad = [
        *(("bad.jpg", b"no image"), ("bad.cls", b"0")),
        *(("cut.png", make_picture(1)[:60]), ("cut.cls", b"1")),
        ("alone.cls", b"0"),
        ("lonely.png", make_picture(2)),
        ("._lonely.png", b"of a Mac"),
        *(("without", make_picture(3)), ("without.cls", b"0")),
    ]
    (whole,) = measure(write(tmp_path / "good", []))
    (found,) = measure(write(tmp_path / "bad", bad), batch_size=4, max_rejected=5 / 14)
    assert found.summary["skipped"] == {
        "folder, or leftover of macOS, Windows or an archiver": 1,
        "not an image": 1,
        "unreadable image": 1,
        "without image or target": 3,
    }
    assert found.summary["images"] == 9
    assert found.classes.equals(whole.classes)
    assert found.summary["top5"]["value"] is None  # of two classes
    told = r"5 of 14 samples \(35.7%\) of bad are left out, more than `max_rejected` 0.1: not an image: 1, unreadable image: 1, "
    with pytest.raises(UserError, match=told):
        measure(tmp_path / "bad")
    for max_rejected in (-0.1, 1.1):
        with pytest.raises(UserError, match=f"`max_rejected` {max_rejected}: must lie between 0 and 1"):
            measure(tmp_path / "bad", max_rejected=max_rejected)


def test_groups_tell_how_many_of_their_classes_have_images(measure, tmp_path, make_classification, class_names):
    """Six classes; images of classes 0, 1 and 5."""
    folder = make_classification(tmp_path / "some", [0, 0, 0, 1, 5, 5], shards=2)
    (tmp_path / "counts.json").write_text(json.dumps(dict(zip(class_names, (60, 50, 40, 30, 20, 10), strict=True))))
    (found,) = measure(folder, train_counts=tmp_path / "counts.json")
    groups = found.summary["groups"]
    assert {
        name: (group["classes"], group["classes_with_images"], group["images"]) for name, group in groups.items()
    } == {
        "head": (2, 2, 4),
        "medium": (2, 0, 0),
        "few": (2, 1, 2),
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_postscript_is_skipped_and_starts_no_program(measure, tmp_path, make_tar, make_picture, postscript, workers):
    content, started = postscript
    images = [*(make_picture(i) for i in range(12)), content]
    members = [m for i, image in enumerate(images) for m in ((f"{i}.png", image), (f"{i}.cls", str(i % 2).encode()))]
    make_tar(tmp_path / "set" / "0.tar", members)
    (tmp_path / "set" / "classnames.txt").write_text("cat\nreel\n")
    (found,) = measure(tmp_path / "set", workers=workers)
    assert (found.summary["images"], found.summary["skipped"]) == (12, {"not an image": 1})
    assert not started.exists()


def test_captions_that_are_no_text_are_counted(measure, tmp_path, make_tar, make_retrieval, make_picture):
    folder = make_retrieval(tmp_path / "texts", texts_of(8))
    odd = [
        ("u.png", make_picture(1)),
        ("u.txt", "red\r\nblue".encode("utf-16")),
        ("x.png", make_picture(2)),
        ("x.txt", b"caf\xe9"),
    ]
    make_tar(folder / "test" / "2.tar", odd)
    (folder / "test" / "nshards.txt").write_text("3")
    (found,) = measure(folder)
    assert (found.summary["images"], found.summary["texts"]) == (9, sum(map(len, texts_of(8))) + 2)
    assert found.summary["skipped"] == {"caption is not text": 1}


def test_samples_of_tars_are_those_that_an_import_finds(measure, tmp_path, make_picture):
    """Dotted names, images before all targets, links, leftovers of macOS, a second tar behind the first one's end."""

    def tar_of(items):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for name, content in items:
                info = tarfile.TarInfo(name)
                if isinstance(content, str):
                    info.type, info.linkname = (tarfile.SYMTYPE if "soft" in name else tarfile.LNKTYPE), content
                else:
                    info.size = len(content)
                tar.addfile(info, None if isinstance(content, str) else io.BytesIO(content))
        return stream.getvalue()

    images = [(f"photo.{i:03d}.png", make_picture(i)) for i in range(6)]
    targets = [(f"photo.{i:03d}.TARGET", b"1") for i in range(6)]
    linked = [("a.png", make_picture(6)), ("a.TARGET", b"1"), ("b.png", "a.png"), ("b.TARGET", "a.TARGET")]
    soft = [("soft.png", "a.png"), ("soft.TARGET", "a.TARGET"), ("lost.png", "nowhere.png"), ("twice.TARGET", b"1")]
    twice = [("twice.png", make_picture(7)), ("z.TARGET", b"0"), ("twice.png", make_picture(8))]
    mac = [(f"._{name}", b"mac") for name, _ in images]
    sets = []
    for folder, target in (("import", "txt"), ("set", "cls")):
        parts = ([*images, *targets], linked, [*soft, *twice], mac)
        parts = [tar_of([(n.replace("TARGET", target), m if isinstance(m, bytes) else m.replace("TARGET", target)) for n, m in part])
                 for part in parts]  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_bytes(b"".join(parts))
        sets.append(tmp_path / folder)
    (sets[1] / "classnames.txt").write_text("cat\nreel\n")
    (found,) = measure(sets[1], max_rejected=1)
    imported = import_pool(sets[0], tmp_path / "catalog", workers=1)
    assert found.summary["images"] == imported.new_samples == 10
    skipped = dict(found.summary["skipped"])
    assert skipped.pop("without image or target") == imported.rejections.counts["import", "caption without image"] == 1
    assert skipped.pop("folder, or leftover of macOS, Windows or an archiver") == 6
    assert skipped == {"duplicate key": 1, "link without target": 1}
    assert all(imported.rejections.counts["import", reason] == count for reason, count in skipped.items())


def test_mistakes_in_sets_are_one_line(measure, tmp_path, make_tar, make_picture, make_classification):
    def told(data, **options):
        with pytest.raises(UserError) as caught:
            measure(data, **options)
        return str(caught.value)

    beyond = make_classification(tmp_path / "beyond", [0, 1, 6, 2])
    assert "holds an image of class 6, but 6 class names (0 … 5)" in told(beyond)
    assert "holds an image of class 6" in told(beyond, workers=2)
    words = make_classification(tmp_path / "words", [0, 1], label_bytes=lambda label: b"cat")
    assert "a .cls holds b'cat': must be the index of a class" in told(words, workers=2)
    empty = make_classification(tmp_path / "empty", [])
    assert "holds no image that can be read" in told(empty)
    cut = make_classification(tmp_path / "cut", list(range(6)) * 4)
    content = (cut / "test" / "1.tar").read_bytes()
    (cut / "test" / "1.tar").write_bytes(content[:3600])
    assert re.search(r"1\.tar can't be read \(ends within 's\d+\.png', at byte 3600\)", told(cut, workers=2))
    for pack, name in ((gzip.compress, "gzip"), (lzma.compress, "xz")):
        (cut / "test" / "1.tar").write_bytes(pack(content))
        assert (
            f"1.tar can't be read ({name}; only .tar files, and compressed ones whose name says so, are read: unpack it"
            in told(cut)
        )
    (cut / "test" / "1.tar").unlink()
    assert "1.tar can't be read" in told(cut)
    assert "both say how often" in told(cut, pool=tmp_path, train_counts=tmp_path)
    for groups in ("halves", "20,100"):
        assert "give thirds, or two bounds" in told(cut, groups=groups)
    assert "`precision` 'fp8': must be one of fp32, bf16" in told(beyond, precision="fp8")
    assert "`device` 'abacus' cannot be used" in told(beyond, device="abacus")


def test_checkpoints_in_all_forms(tmp_path, classification_set, measure, tiny_checkpoint, tiny_model, tiny_weights):
    (expected,) = measure(classification_set)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "params.txt").write_text(f"batch_size: 8\nmodel: {tiny_model}\nforce_quick_gelu: False\nimage_mean: None\n")
    for epoch in (2, 10):
        torch.save(
            {"state_dict": {name: value * epoch for name, value in tiny_weights.items()}},
            run / f"checkpoints/epoch_{epoch}.pt",
        )
    assert find_checkpoint(run).weights.name == "epoch_10.pt"
    shutil.copy(tiny_checkpoint, run / "checkpoints" / "epoch_latest.pt")
    assert find_checkpoint(run).weights.name == "epoch_latest.pt"
    whole = tmp_path / "whole"
    shutil.copytree(tiny_model.removeprefix("local-dir:"), whole)
    torch.save(tiny_weights, whole / "open_clip_pytorch_model.bin")
    options = EvaluateRequest(workers=1, bootstrap=50, device="cpu")
    for checkpoint in (run, run / "checkpoints" / "epoch_latest.pt", f"open_clip:local-dir:{whole}"):
        (found,) = evaluate(checkpoint, str(classification_set), options)
        assert found.summary == expected.summary


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "part"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_names_of_compiled_and_distributed_models_are_those_of_the_plain_one(
    tmp_path, tiny_model, tiny_weights, prefix, wrapped
):
    renamed = {prefix + name: value for name, value in tiny_weights.items()}
    if prefix == "part":  # one part of the model is compiled
        renamed = {name.replace("visual.", "visual._orig_mod."): value for name, value in tiny_weights.items()}
    torch.save({"state_dict": renamed} if wrapped else renamed, tmp_path / "weights.pt")
    loaded = load_model(find_checkpoint(tmp_path / "weights.pt", tiny_model), "cpu")
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, tiny_weights[name])


@pytest.mark.parametrize("kind", ["ema", "lora", "optimizer"])
def test_names_that_do_not_fit_are_told(tmp_path, tiny_model, tiny_weights, kind):
    saved = {
        "ema": {f"ema_model.{name}": value for name, value in tiny_weights.items()},
        "lora": {"base_model.model.visual.lora_A.weight": torch.zeros(2)},
        "optimizer": {"optimizer": {"state": {}}, "epoch": 3},
    }[kind]
    torch.save(saved, tmp_path / "weights.pt")
    with pytest.raises(UserError) as caught:
        load_model(find_checkpoint(tmp_path / "weights.pt", tiny_model), "cpu")
    first = min(saved)
    assert f"it lacks {len(tiny_weights)} of the model's {len(tiny_weights)} weights, such as" in str(caught.value)
    assert f"unknown to the model, such as {first}" in str(caught.value)


def test_a_bomb_in_a_tar_takes_little_memory(measure, tmp_path, make_picture):
    """Four images of one sample and a target that are too long; the other samples are used."""
    members = [("b.txt", 1 << 20)] + [(f"b.{kind}", (1 << 27) + 1) for kind in ("jpg", "png")]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("a.png", make_picture(1)), ("a.cls", b"0"), ("b.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, _Zeros())
    (tmp_path / "classnames.txt").write_text("cat\nreel\n")
    (found,) = measure(tmp_path, max_rejected=0.5)
    assert found.summary["skipped"] == {"image of too many bytes": 1}
    assert found.summary["images"] == 1


class _Zeros:
    def read(self, size):
        return bytes(size)


def test_a_run_s_settings_are_taken_over(tmp_path, tiny_model, tiny_checkpoint):
    (tmp_path / "params.txt").write_text(
        f"model: {tiny_model}\nforce_quick_gelu: True\nforce_image_size: [48]\nimage_mean: [0.1, 0.2, 0.3]\nlr: 0.1\n"
    )
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(tiny_checkpoint, tmp_path / "checkpoints" / "epoch_1.pt")
    found = find_checkpoint(tmp_path)
    assert found.settings == {"force_quick_gelu": True, "force_image_size": 48, "image_mean": [0.1, 0.2, 0.3]}


def test_checkpoints_that_can_t_be_used(tmp_path, tiny_checkpoint, tiny_model, classification_set):
    def told(checkpoint, model=None):
        with pytest.raises(UserError) as caught:
            evaluate(checkpoint, classification_set, EvaluateRequest(model=model, device="cpu", workers=1))
        return str(caught.value)

    assert "there is no" in told(tmp_path / "absent.pt")
    assert "holds no checkpoint" in told(tmp_path)
    assert "cannot infer the model of" in told(tiny_checkpoint)
    assert "open_clip knows no model 'ViT-Q-1'" in told(tiny_checkpoint, "ViT-Q-1")
    assert "open_clip_config.json: give `model`" in told(tiny_checkpoint, f"local-dir:{tmp_path}")
    assert re.search("can't be loaded: .*; check the file and `model`", told(tiny_checkpoint, "RN50"))
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    assert "broken.pt as local-dir:" in told(tmp_path / "broken.pt", tiny_model)
    assert "give open_clip:MODEL/PRETRAINED" in told("open_clip:ViT-B-32")
    assert "open_clip has no weights 'mine' of ViT-B-32: use one of" in told("open_clip:ViT-B-32/mine")
    assert "`model` does nothing" in told("open_clip:ViT-B-32/openai", tiny_model)


def test_a_diverged_model_is_refused(tmp_path, tiny_weights, tiny_model, classification_set):
    torch.save(
        {"state_dict": {name: value * float("nan") for name, value in tiny_weights.items()}}, tmp_path / "nan.pt"
    )
    with pytest.raises(UserError, match="gives no finite numbers on pictures"):
        evaluate(tmp_path / "nan.pt", classification_set, EvaluateRequest(model=tiny_model, device="cpu", workers=1))


def test_bf16_is_near(measure, classification_set):
    (exact,), (rough,) = (measure(classification_set, precision=precision) for precision in ("fp32", "bf16"))
    assert abs(exact.summary["top1"]["value"] - rough.summary["top1"]["value"]) < 0.15


def test_the_command_writes_the_same_bytes_again(
    tmp_path, tiny_checkpoint, tiny_model, classification_set, tree_bytes, make_retrieval
):
    (tmp_path / "counts.csv").write_text("class_index,count\n" + "".join(f"{c},{4**c}\n" for c in range(6)))
    retrieval = make_retrieval(tmp_path / "texts", texts_of(12))
    output = tmp_path / "output"

    def run(*more, checkpoint=tiny_checkpoint):
        arguments = [
            "evaluate",
            checkpoint,
            "--model",
            tiny_model,
            "--device",
            "cpu",
            "--workers",
            1,
            "--bootstrap",
            50,
        ]
        sets = [item for data in (classification_set, retrieval) for item in ("--data", data)]
        return CliRunner().invoke(app, [str(item) for item in (*arguments, *sets, *more)])

    counts = ("--train-counts", tmp_path / "counts.csv")
    first = run(*counts, "--output", output, "--png")
    assert first.exit_code == 0, first.output
    for words in ("top-1", "head", "text → image R@1", f"written to {output}"):
        assert words in first.output
    written = tree_bytes(output)
    assert set(written) == {"summary.json", "classes-pictures.csv", "curve-pictures.svg", "curve-pictures.png"}
    assert written["curve-pictures.png"].startswith(b"\x89PNG")
    assert run(*counts, "--output", output).exit_code == 0
    assert tree_bytes(output) == written
    printed = json.loads(run(*counts, "--json").output)
    assert printed == {key: value for key, value in json.loads(written["summary.json"]).items() if key != "config"}
    assert set(printed["mean"]) == {"top1", "mean_per_class", "mean_recall@1"}
    header, *rows = written["classes-pictures.csv"].decode().splitlines()
    assert header == '"class","name","train_count","group","images","right","right_top5","accuracy"'
    assert len(rows) == 6
    other = run("--output", output, "--seed", 1)
    assert isinstance(other.exception, UserError)
    assert "holds another evaluation (" in str(other.exception)
    assert tree_bytes(output) == written
    assert run("--output", output, "--seed", 1, "--overwrite").exit_code == 0
    elsewhere = run("--output", tmp_path)
    assert "holds something else" in str(elsewhere.exception)


def test_names_that_plots_and_spreadsheets_would_obey(tiny_checkpoint, tiny_model, make_classification, tmp_path):
    names = ('=HYPERLINK("http://x","y")', "@SUM(1)", "+1+1", "-1", "$\\bar$", "$x_{$ \x1b[31m")
    data = make_classification(tmp_path / "x$\\foo$", [0, 1, 2, 3, 4, 5], names=names)
    (tmp_path / "counts.csv").write_text("class_index,count\n" + "".join(f"{c},{4**c}\n" for c in range(6)))
    arguments = ["evaluate", tiny_checkpoint, "--model", tiny_model, "--data", data, "--workers", 1, "--bootstrap", 5]
    arguments += ["--train-counts", tmp_path / "counts.csv", "--output", tmp_path / "out"]
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "out").glob("*.csv")
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == [*(f"'{name}" for name in names[:4]), *names[4:]]
    assert [int(row["train_count"]) for row in rows] == [4**c for c in range(6)]
    assert "x$\\foo$: top-1" in next((tmp_path / "out").glob("*.svg")).read_text(encoding="utf-8")


def test_a_mistake_is_one_line_and_exit_code_2(run_tailwise, tmp_path):
    result = run_tailwise("evaluate", tmp_path / "absent.pt", "--data", tmp_path, code=2)
    assert result.stdout == ""
    assert re.fullmatch(r"tailwise: there is no .*absent\.pt: give a checkpoint.*\n", result.stderr)


def test_the_curve_shows_each_class(measure, classification_set, tmp_path):
    (tmp_path / "counts.json").write_text("[0, 5, 9, 70, 600, 3]")
    (found,) = measure(classification_set, train_counts=tmp_path / "counts.json")
    write_output(tmp_path / "out", {}, [found])
    drawing = io.BytesIO((tmp_path / "out" / "curve-pictures.svg").read_bytes()).read().decode()
    assert drawing.count("<use ") >= 5  # points of classes; class 5 has no image
    for words in ("training samples of the class", "zero-shot accuracy of the class (%)", "pictures: top-1"):
        assert words in drawing
