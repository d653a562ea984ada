"""What a path names: layouts, names, and what is wrong with them."""

import re
from pathlib import Path

import pytest

from tailwise.errors import UserError
from tailwise.evaluate.images import FileShard, TarShard
from tailwise.evaluate.sets import _resolvable, fill, find_set, set_name
from tailwise.storage import delimited


@pytest.fixture
def folders(tmp_path, make_picture):
    """A folder with a folder of images for each of three classes."""
    for name in ("b_cat", "a_dog", "c_owl"):
        (tmp_path / "pets" / name / "deep").mkdir(parents=True)
        (tmp_path / "pets" / name / "1.PNG").write_bytes(make_picture(0))
        (tmp_path / "pets" / name / "deep" / "2.jpg").write_bytes(make_picture(1))
        (tmp_path / "pets" / name / "notes.txt").write_text("no image")
    return tmp_path / "pets"


def test_the_benchmarks_layout(classification_set, class_names):
    found = find_set(str(classification_set))
    assert (found.name, found.task, found.classes) == ("pictures", "classification", class_names)
    assert found.templates == ("a photo of a {c}.", "art of the {c}.", "{c}")
    assert found.shards == tuple(TarShard(f"{classification_set}/test/{number}.tar", ("cls",)) for number in range(3))
    by_url = find_set(f"file://{classification_set}")
    assert (by_url.name, by_url.classes, len(by_url.shards)) == ("pictures", class_names, 3)


def test_names_and_templates_of_the_users_own(classification_set, tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\n")
    (tmp_path / "prompts.txt").write_text("the {}\n")
    found = find_set(str(classification_set), tmp_path / "names.txt", tmp_path / "prompts.txt")
    assert (found.classes, found.templates) == (("a", "b"), ("the {}",))


def test_tars_without_more(tmp_path, make_tar, make_picture):
    for number in (0, 2, 10):
        make_tar(tmp_path / f"{number}.tar", [("x.jpg", make_picture(0)), ("x.cls", b"0")])
    with pytest.raises(UserError, match=r"has no classnames\.txt: give `classes`"):
        find_set(str(tmp_path))
    names = tmp_path / "names"
    names.write_text("one")
    assert [shard.path.rsplit("/", 1)[1] for shard in find_set(str(tmp_path), names).shards] == [
        "0.tar",
        "2.tar",
        "10.tar",
    ]
    for pattern in ("{0..2..2}.tar", "[02].tar"):
        assert len(find_set(str(tmp_path / pattern), names).shards) == 2
    assert find_set(f"file://{tmp_path}/{{0,2}}.tar", names).shards[1].path == f"file://{tmp_path}/2.tar"


def test_folders_of_images(folders, tmp_path):
    found = find_set(str(folders))
    assert found.classes == ("a dog", "b cat", "c owl")
    (shard,) = found.shards
    assert isinstance(shard, FileShard)
    assert [(Path(path).relative_to(folders).as_posix(), label) for path, label in shard.files][:3] == [
        ("a_dog/1.PNG", 0),
        ("a_dog/deep/2.jpg", 0),
        ("b_cat/1.PNG", 1),
    ]
    (tmp_path / "names").write_text("dog\ncat\n")
    with pytest.raises(UserError, match="2 class names for the 3 folders"):
        find_set(str(folders), tmp_path / "names")


def test_folders_named_by_wordnet_want_names(folders):
    for number, folder in enumerate(sorted(folders.iterdir())):
        folder.rename(folders / f"n0000000{number}")
    with pytest.raises(UserError, match="WordNet ids: give `classes`"):
        find_set(str(folders))


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("test/nshards.txt", "none", "says 'none': must be the number of tars"),
        ("test/nshards.txt", "0", "must be the number of tars"),
        ("dataset_type.txt", "multilabel", "says 'multilabel': only classification and retrieval"),
        ("classnames.txt", "a\n\nb\n", "has an empty line"),
        ("test/nshards.txt", "1\n2\n", "says '1 2': must be the number of tars"),
        ("test/nshards.txt", "9" * 5000, "must be the number of tars, 1 to 1,000,000"),
        ("test/nshards.txt", "999999999", "must be the number of tars, 1 to 1,000,000"),
        ("classnames.txt", "a\n" + "b" * 1001, "classnames.txt has a line of 1,001 characters"),
        ("zeroshot_classification_templates.txt", "{c}\n" + "b" * 1001, "has a line of 1,001 characters"),
        ("zeroshot_classification_templates.txt", "a {c}\n" * 1001, "at most 1,000 templates"),
        *(
            ("zeroshot_classification_templates.txt", f"a {{c}}\na {field}", f"holds 'a {field}': use {{c}}")
            for field in (
                "{c:>1500000000}",
                "{c:{c}}",
                "{c!r}",
                "{c.__class__}",
                "{c[0]}",
                "{:9}",
                "{1}",
                "{",
                "{c",
                "{{c}}",
                "}",
            )
        ),
        ("zeroshot_classification_templates.txt", "a photo of {x}", "holds 'a photo of {x}': use {c}"),
        ("zeroshot_classification_templates.txt", "a photo", "holds 'a photo': use {c}"),
    ],
)
def test_mistakes_are_named(make_classification, tmp_path, file, text, words):
    folder = make_classification(tmp_path / "set", [0, 1, 2])
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        find_set(str(folder))


def test_nothing_there(tmp_path):
    for data in (str(tmp_path / "absent"), f"file://{tmp_path}/absent"):
        with pytest.raises(UserError, match="is no set"):
            find_set(data)
    with pytest.raises(UserError, match="holds no images"):
        find_set(str(tmp_path))


def test_names_of_sets():
    assert set_name("/data/wds_imagenet1k/") == "wds_imagenet1k"
    assert set_name("/data/imagenet/val") == "imagenet-val"
    assert set_name("s3://bucket/sets/wds_cars") == "wds_cars"
    page = "https://huggingface.co/datasets/clip-benchmark/wds_cars/tree/main"
    assert _resolvable(page) == "https://huggingface.co/datasets/clip-benchmark/wds_cars/resolve/main"
    assert set_name(_resolvable(page)) == "wds_cars"


def test_templates_take_either_brace():
    assert fill("a {c}, {c}", "cat {x}") == "a cat {x}, cat {x}"
    assert fill("a {}", "cat") == "a cat"
    assert fill("{{}} {0}", "cat") == "{} cat"


def test_prompts_are_bounded(make_classification, tmp_path, monkeypatch):
    monkeypatch.setattr("tailwise.evaluate.sets.MAX_PROMPTS", 10)
    folder = make_classification(tmp_path / "set", [0, 1, 2])
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n" * 2)
    with pytest.raises(UserError, match=r"2 templates for 6 classes: .* 10 prompts"):
        find_set(str(folder))


def test_long_files_are_not_read(make_classification, tmp_path, monkeypatch):
    monkeypatch.setattr(delimited.read_text, "__defaults__", (100,))
    folder = make_classification(tmp_path / "set", [0, 1, 2])
    (folder / "classnames.txt").write_text("name\n" * 30)
    with pytest.raises(UserError, match="has more than 100 characters"):
        find_set(str(folder))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_texts_of_a_set_are_read_in_any_usual_encoding(make_classification, tmp_path, encoding):
    folder = make_classification(tmp_path / "set", [0, 1, 2])
    for path in folder.rglob("*.txt"):
        path.write_text(path.read_text().replace("tabby cat", "größe"), encoding=encoding, newline="\r\n")
    found = find_set(str(folder))
    assert found.classes[:2] == ("größe", "reel")
    assert found.templates[0] == "a photo of a {c}."
