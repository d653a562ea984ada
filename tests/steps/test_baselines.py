"""DataComp's baselines: the same uids as plain pandas and NumPy, and as the functions of the toolkit, where a path to it is given."""

import json
import os
import re
import sys
import weakref
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.context import Context
from tailwise.errors import ConflictError, NotFoundError, UserError
from tailwise.execution import shuffle
from tailwise.requests import BaselinesRequest
from tailwise.steps import baselines
from tailwise.steps.baselines import BASELINES, write_baselines

FILES, ROWS, DIMENSION = 4, 300, 6
TOOLKIT = os.environ.get("TAILWISE_DATACOMP_TOOLKIT")
LETTERS = [*"abcdE é\n", "\x1c", "\u3000", "\0", *"  "]
ENTITIES = {"a": 11, "de": 12, "é": 13, "ce": 14}  # word → number of its synset


def language(text, modulus):
    return "en" if zlib.crc32(text.replace("\n", " ").encode()) % modulus else "de"


def tokens(text):
    return re.findall(r"\n|[^ \n\r\t\v\f\0]+", text)


@pytest.fixture
def pool(tmp_path, make_metadata):
    """Metadata in several files, some rows of which are alike, with two columns of languages; and what the options name."""
    rng = np.random.default_rng(0)
    for number in range(FILES):
        uids = [rng.bytes(16).hex() for _ in range(ROWS)]
        uids[:3] = [f"{at:032x}" for at in range(3)]  # in each file
        texts = ["".join(rng.choice(LETTERS, rng.integers(0, 14))) for _ in range(ROWS)]
        width, height = (rng.choice([150, 199, 200, 300, 599, 600, 601, None], ROWS) for _ in range(2))
        scores = rng.integers(0, 40, ROWS) / 64
        scores[rng.random(ROWS) < 0.05] = np.nan
        make_metadata(
            tmp_path / "metadata",
            f"{number:08d}",
            uids,
            {"l14_img": rng.integers(-4, 5, (ROWS, DIMENSION)).astype(np.float16) / 8},
            compressed=number % 2 == 0,
            text=texts,
            original_width=pa.array(width, pa.int64()),
            original_height=pa.array(height, pa.int64()),
            clip_l14_similarity_score=pa.array(scores, pa.float64() if number else pa.float32(), from_pandas=False),
            clip_b32_similarity_score=rng.choice([0.1, 0.28, np.nextafter(0.28, 0), 0.3], ROWS),
            lang=[language(text, 4) for text in texts],
            laion=[language(text, 3) for text in texts],
        )
    (tmp_path / "words.txt").write_text("".join(f"{word}\n" for word in ENTITIES))
    np.save(tmp_path / "centroids.npy", rng.integers(-3, 4, (20, DIMENSION)).astype(np.float32) / 4)
    np.save(tmp_path / "target.npy", rng.integers(-3, 4, (5, DIMENSION)).astype(np.float32))
    return tmp_path


def options(pool, **changed):
    files = {"entities": "words.txt", "centroids": "centroids.npy", "target": "target.npy"}
    names = {"language": "lang", "laion_language": "laion"}
    return {**names, **{option: pool / name for option, name in files.items()}, **changed}


def subsets(folder):
    return {path.stem: np.load(path) for path in folder.glob("*.npy")}


def reference(pool):
    """The six baselines as published, on the whole pool at once."""
    paths = sorted((pool / "metadata").glob("*.parquet"))
    pool_frame = pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True)
    images = np.concatenate([np.load(path.with_suffix(".npz"))["l14_img"] for path in paths]).astype(np.float64)
    centroids, target = np.load(pool / "centroids.npy"), np.load(pool / "target.npy")
    text, english = pool_frame.text, (pool_frame.lang == "en").to_numpy()
    least = np.minimum(pool_frame.original_width, pool_frame.original_height)
    most = np.maximum(pool_frame.original_width, pool_frame.original_height)
    scores = pool_frame.clip_l14_similarity_score.to_numpy()
    top = scores >= np.sort(np.nan_to_num(scores, nan=-1))[::-1][int(len(scores) * 0.3)]
    long = (text.str.len() > 5).to_numpy()
    near = np.isin(np.argmax(images @ centroids.T, 1), np.argmax(target @ centroids.T, 1))
    image = english & near & long & np.array([len(tokens(each)) > 1 for each in text])
    masks = {
        "basic_filter": english & (text.str.split().str.len() > 2) & long & (least >= 200) & (most / least <= 3),
        "clip_score": top,
        "laion2b": (pool_frame.laion == "en") & (pool_frame.clip_b32_similarity_score >= 0.28),
        "text_based": english & np.array([any(word.lower() in ENTITIES for word in each.split()) for each in text]),
        "image_based": image,
        "image_based_intersect_clip_score": image & top,
    }
    return {
        name: as_subset(pool_frame.uid[mask.to_numpy() if hasattr(mask, "to_numpy") else mask])
        for name, mask in masks.items()
    }


def as_subset(uids):
    return np.sort(np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], "u8,u8"))


def assert_same(found, expected):
    assert {*found} == {*expected}
    for name, uids in expected.items():
        assert 5 < len(uids) < FILES * ROWS
        np.testing.assert_array_equal(found[name], uids, name)


def test_the_uids_are_those_of_the_published_rules(pool, monkeypatch):
    made = write_baselines(pool / "metadata", pool / "all", BaselinesRequest(**options(pool)))
    expected = reference(pool)
    assert_same(subsets(pool / "all"), expected)
    assert made.samples == FILES * ROWS
    assert made.kept == {name: len(uids) for name, uids in expected.items()}
    files = {path.name: path.read_bytes() for path in (pool / "all").iterdir()}
    for name, value in {"BATCH_ROWS": 37, "BUCKET_ROWS": 100, "GROUP_ROWS": 350}.items():
        monkeypatch.setattr(baselines, name, value)
    write_baselines(pool / "metadata", pool / "pieces", BaselinesRequest(**options(pool)))
    assert files == {path.name: path.read_bytes() for path in (pool / "pieces").iterdir()}
    for name, only in expected.items():  # each alone, which reads less
        write_baselines(pool / "metadata", pool / name, BaselinesRequest(only=[name], **options(pool)))
        assert_same(subsets(pool / name), {name: only})


def test_languages_in_tables(pool):
    frame = pd.concat([pd.read_parquet(path) for path in (pool / "metadata").glob("*.parquet")])
    frame = frame[~frame.uid.duplicated(keep=False)].sample(frac=1, random_state=0)[50:]
    for column, path in (("lang", "lang.parquet"), ("laion", "laion.csv")):
        table = pa.table({"uid": frame.uid.str.upper(), "language": frame[column]})
        pq.write_table(table, pool / path) if path.endswith("parquet") else table.to_pandas().to_csv(
            pool / path, index=False
        )
    tables = options(pool, language=str(pool / "lang.parquet"), laion_language=str(pool / "laion.csv"))
    made = write_baselines(pool / "metadata", pool / "out", BaselinesRequest(**tables))
    known = as_subset(frame.uid)
    expected = {
        name: uids if name == "clip_score" else uids[np.isin(uids, known)] for name, uids in reference(pool).items()
    }
    assert_same(subsets(pool / "out"), expected)
    assert {*made.unknown.values()} == {FILES * ROWS - len(frame)}


@pytest.mark.skipif(TOOLKIT is None, reason="TAILWISE_DATACOMP_TOOLKIT names no checkout of mlfoundations/datacomp")
def test_the_uids_are_those_of_the_toolkit(pool, monkeypatch):
    toolkit = toolkit_with(pool, monkeypatch)
    folder = str(pool / "metadata")
    found = {
        "basic_filter": toolkit.load_uids_with_basic_filter(folder, 1),
        "clip_score": toolkit.load_uids_with_clip_score(folder, "l14", None, 0.3, 1),
        "laion2b": toolkit.load_uids_with_clip_score(folder, "b32", 0.28, None, 1, gcld3_en_filter=True),
        "text_based": toolkit.load_uids_with_text_entity(folder, 1),
    }
    write_baselines(pool / "metadata", pool / "ours", BaselinesRequest(only=[*found], **options(pool)))
    assert_same(subsets(pool / "ours"), {name: np.sort(uids) for name, uids in found.items()})


def toolkit_with(pool, monkeypatch):
    """The module of the toolkit's filters, with languages, WordNet and tokens that need no download; its pool of workers runs here."""
    (pool / "ids").write_text("".join(f"n{number}\n" for number in ENTITIES.values()))
    model = SimpleNamespace(predict=lambda text: ([f"__label__{language(text, 4)}"], [1.0]))
    other = SimpleNamespace(FindLanguage=lambda text: SimpleNamespace(language=language(text, 3)))
    wordnet = SimpleNamespace(
        synsets=lambda word: [SimpleNamespace(offset=lambda: ENTITIES[word.lower()])] * (word.lower() in ENTITIES)
    )
    stubs = {
        "fasttext": {"load_model": lambda _: model, "tokenize": tokens, "FastText": SimpleNamespace()},
        "gcld3": {"NNetLanguageIdentifier": lambda **_: other},
        "nltk": {},
        "nltk.corpus": {"wordnet": wordnet},
    }
    for name, values in stubs.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(values)
    monkeypatch.syspath_prepend(TOOLKIT)
    from baselines import apply_filter

    assert Path(apply_filter.__file__).is_relative_to(Path(TOOLKIT).resolve())
    monkeypatch.setattr(apply_filter, "download", lambda *_: str(pool / "ids"))
    monkeypatch.setattr(
        apply_filter, "worker_threadpool", lambda work, join, paths, _: join([work(path) for path in paths])
    )
    return apply_filter


def test_a_caption_that_is_missing_is_empty(tmp_path, make_metadata):
    uids = [f"{number:032x}" for number in range(3)]
    make_metadata(tmp_path / "m", "x", uids, text=[None, "one two three", None], lang=["en", "en", None])
    made = write_baselines(tmp_path / "m", tmp_path / "out", BaselinesRequest(["basic_filter"], language="lang"))
    assert made.kept == {"basic_filter": 1}


def test_few_scores_and_no_rows(tmp_path, make_metadata):
    uids = [f"{number:032x}" for number in range(4)]
    make_metadata(tmp_path / "m", "x", uids, clip_l14_similarity_score=[None, None, 0.5, None])
    made = write_baselines(tmp_path / "m", tmp_path / "out", BaselinesRequest(["clip_score"]))
    assert made.kept == {"clip_score": 0}  # the toolkit's threshold is NaN
    assert len(np.load(tmp_path / "out" / "clip_score.npy")) == 0
    make_metadata(tmp_path / "empty", "x", [])
    assert write_baselines(tmp_path / "empty", tmp_path / "none", BaselinesRequest(["clip_score"])).samples == 0


def test_the_command(pool, run_tailwise):
    words = [word for option, value in options(pool).items() for word in (f"--{option.replace('_', '-')}", value)]
    place = ["baselines", pool / "metadata", pool / "out", *words]
    found = json.loads(run_tailwise(*place, "--json").stdout)
    assert found["kept"] == {name: len(uids) for name, uids in reference(pool).items()}
    shown = run_tailwise(*place).stdout  # the same again
    for name, kept in found["kept"].items():
        assert f"{name}" in shown
        assert f"{kept:,}" in shown
    fewer = ["baselines", pool / "metadata", pool / "out", "--only", "basic_filter", "--language"]
    assert "exists: name another file, or replace it with --overwrite" in run_tailwise(*fewer, "laion", code=2).stderr
    run_tailwise(*fewer, "laion", "--overwrite")
    assert "basic_filter needs --language" in run_tailwise(*fewer[:-1], code=2).stderr


def test_files_that_change_between_two_calls_are_read_again(pool):
    context, words = Context(), pool / "words.txt"
    request = BaselinesRequest(["text_based"], **options(pool))
    first = write_baselines(pool / "metadata", pool / "out", request, context)
    words.write_text("a\n")
    again = write_baselines(pool / "metadata", pool / "out", request, context, overwrite=True)
    assert again.kept["text_based"] < first.kept["text_based"]
    assert again == write_baselines(pool / "metadata", pool / "fresh", request)


def test_another_command_that_writes_the_same_files_is_refused_and_spoils_nothing(pool):
    (pool / "other.txt").write_text("a\n")
    other = BaselinesRequest(["text_based"], **options(pool, entities=pool / "other.txt"))
    refused = []

    def track(items, description, *_):
        if description == "writing subsets":
            with pytest.raises(ConflictError, match=r"another command is writing .*text_based.npy"):
                write_baselines(pool / "metadata", pool / "out", other)
            refused.append(other)
        return items

    write_baselines(pool / "metadata", pool / "out", BaselinesRequest(**options(pool)), Context(progress=track))
    assert refused
    assert_same(subsets(pool / "out"), reference(pool))
    assert {path.suffix for path in (pool / "out").iterdir()} == {".npy"}


def test_a_long_file_is_judged_as_it_is_read(pool, monkeypatch):
    """One file of all rows: its records are never together in memory."""
    frame = pd.concat([pd.read_parquet(path) for path in sorted((pool / "metadata").glob("*.parquet"))])
    (pool / "one").mkdir()
    frame.to_parquet(pool / "one" / "all.parquet", row_group_size=100)
    monkeypatch.setattr(baselines, "BATCH_ROWS", 50)
    most = 0
    held = []

    class Piece(np.ndarray):
        pass

    def watched(*given):
        piece = kept(*given).view(Piece)
        held.append(weakref.ref(piece))
        nonlocal most
        most = max(most, sum(piece() is not None for piece in held))
        return piece

    kept = baselines._Judge._judged
    monkeypatch.setattr(baselines._Judge, "_judged", watched)
    monkeypatch.setattr(shuffle, "RUN_BYTES", 1)
    request = BaselinesRequest(["basic_filter", "text_based"], **options(pool))
    write_baselines(pool / "one", pool / "out", request)
    assert 0 < most < 5
    assert_same(subsets(pool / "out"), {name: reference(pool)[name] for name in request.only})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"only": ["basic"]}, "`only` basic: the baselines are basic_filter, "),
        ({"only": ["text_based"], "entities": None}, "text_based needs `entities`"),
        ({"language": "tongue"}, "no column 'tongue'"),
        ({"language": "lost.parquet"}, "lost.parquet can't be read"),
        ({"entities": "empty.txt"}, "is empty: write a word a line"),
        ({"centroids": "wide.npy"}, "has 6 dimensions, and `centroids` 7"),
        ({"centroids": "words.txt"}, "can't be read as .npy"),
        ({"target": "flat.npy"}, r"holds float64 \[3\]"),
        ({"centroids": "nan.npy"}, "must be finite"),
        ({"target": "nan.npy"}, "not one of its rows holds finite numbers"),
        ({"language": "text"}, "not one of 1,200 samples is in English by text: English is 'en'"),
    ],
)
def test_wrong_options(pool, change, message):
    np.save(pool / "wide.npy", np.ones((3, 7), np.float32))
    np.save(pool / "flat.npy", np.ones(3))
    np.save(pool / "nan.npy", np.full((3, DIMENSION), np.nan))
    (pool / "empty.txt").write_text("\n \n")
    change = {
        name: pool / value if name in {"entities", "centroids", "target"} and value else value
        for name, value in change.items()
    }
    with pytest.raises(UserError, match=message):
        write_baselines(pool / "metadata", pool / "out", BaselinesRequest(**options(pool, **change)))
    assert not [*(pool / "out").glob("*")]


def test_wrong_files(pool, make_metadata):
    request = BaselinesRequest(**options(pool))
    for folder in (pool, pool / "nowhere", pool / "words.txt"):
        with pytest.raises(NotFoundError, match=r"is no folder with .parquet files"):
            write_baselines(folder, pool / "out", request)
    path = pool / "metadata" / "00000001.npz"
    good = path.read_bytes()
    np.savez(path, l14_img=np.zeros((ROWS - 1, DIMENSION), np.float16))
    with pytest.raises(UserError, match=f"l14_img of its .npz has {ROWS - 1} rows, and it has {ROWS}"):
        write_baselines(pool / "metadata", pool / "out", request)
    np.savez(path, l14_img=np.zeros((DIMENSION, ROWS), np.float16).T)
    with pytest.raises(UserError, match=r"l14_img of its .npz is stored by columns"):
        write_baselines(pool / "metadata", pool / "out", request)
    np.savez(path, b32_img=np.zeros((ROWS, DIMENSION), np.float16))
    with pytest.raises(UserError, match=r"00000001.parquet can't be used: .*l14_img"):
        write_baselines(pool / "metadata", pool / "out", request)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match=r"00000001.parquet can't be used"):
        write_baselines(pool / "metadata", pool / "out", request)
    path.write_bytes(good)
    bad = make_metadata(pool / "metadata", "z", ["short"], lang=["en"])
    with pytest.raises(UserError, match=r"z.parquet can't be used: uid 'short' is not 32 hexadecimal digits"):
        write_baselines(pool / "metadata", pool / "out", BaselinesRequest(["clip_score"]))
    bad.unlink()
    other = pool / "taken"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ConflictError, match="holds something else: give OUTPUT a new or an empty folder"):
        write_baselines(pool / "metadata", other, request)
    strange = pd.DataFrame({"uid": ["f" * 32], "language": ["en"]})
    strange.to_parquet(pool / "strange.parquet")
    with pytest.raises(
        UserError, match=r"not one of 1,200 samples is in English by .*strange.parquet: .*a table names the uids"
    ):
        write_baselines(
            pool / "metadata", pool / "out", BaselinesRequest(["basic_filter"], language=str(pool / "strange.parquet"))
        )
    assert {path.name for path in (pool / "out").iterdir()} <= {f"{name}.npy" for name in BASELINES}
