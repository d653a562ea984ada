"""Scores under names of their own: heads of published shapes against torch, mixes against NumPy, and who takes them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from tailwise.catalog import Catalog
from tailwise.catalog.artifacts import artifact_id
from tailwise.catalog.drops import DropList
from tailwise.catalog.files import read_json
from tailwise.cli import app
from tailwise.context import Context
from tailwise.errors import ConflictError, UserError
from tailwise.kernels.moments import exact_sums, mean_and_deviation
from tailwise.plan import Plan
from tailwise.requests import ClusterRequest, DedupRequest, FilterRequest, NamedScoreRequest, PlanRequest, ScoreRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.filter import filter_samples
from tailwise.steps.scoring.mix import Mix
from tailwise.steps.scoring.named import make_named_score
from tailwise.steps.scoring.scores import score_parts
from tailwise.steps.upkeep.delete import delete
from tailwise.steps.upkeep.verify import broken_inputs, verify

WIDTHS = (1024, 128, 64, 16, 1)  # of LAION's improved aesthetic predictor


def read(catalog, name, **options):
    return np.concatenate(list(score_parts(catalog, catalog.snapshot(), ScoreRequest(name, options))))


def embeddings(catalog):
    return np.concatenate(catalog.embedding_parts("image", catalog.snapshot())).astype(np.float64)


class Published(torch.nn.Module):
    """The layers of a head under the names that its authors save: Linear and Dropout; or with an activation between."""

    def __init__(self, widths=WIDTHS, between=torch.nn.Dropout, inputs=16):
        super().__init__()
        torch.manual_seed(0)
        pairs = zip((inputs, *widths), widths, strict=False)
        layers = [each for pair in pairs for each in (torch.nn.Linear(*pair), between())][:-1]
        if widths == WIDTHS and between is torch.nn.Dropout:
            del layers[-2]  # none before the last layer: layers.6 and layers.7
        self.layers = torch.nn.Sequential(*layers)

    def of(self, rows):
        with torch.no_grad():
            return self.eval().double().layers(torch.from_numpy(rows))[:, 0].numpy()


def save(state, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(dict(state), path)
    else:
        torch.save(state, path)
    return path


# --- heads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["aesthetic.safetensors", "aesthetic.pth"])
def test_the_improved_aesthetic_predictor_has_no_activations(small_catalog, tmp_path, form):
    head = Published()
    names = [name for name in head.state_dict() if name.endswith("weight")]
    assert names == [f"layers.{number}.weight" for number in (0, 2, 4, 6, 7)]
    summary = make_named_score(
        small_catalog, NamedScoreRequest(name="a", head=save(head.state_dict(), tmp_path / form))
    )
    assert summary == {"samples": 600, "scored": 600}
    np.testing.assert_allclose(read(small_catalog, "a"), head.of(embeddings(small_catalog)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("state", "activation", "plain"),
    [
        (lambda: torch.nn.Linear(16, 1).state_dict(), None, lambda state, x: x @ state["weight"].T.numpy()[:, 0] + float(state["bias"])),
        (lambda: torch.nn.Linear(16, 1, bias=False).state_dict(), None, lambda state, x: x @ state["weight"].T.numpy()[:, 0]),
        (lambda: {"state_dict": Published((32, 8, 1)).state_dict()}, "none", lambda _, x: Published((32, 8, 1)).of(x)),
        (
            lambda: Published((64, 32, 1), torch.nn.ReLU).state_dict(),
            "relu",
            lambda _, x: Published((64, 32, 1), torch.nn.ReLU).of(x),
        ),
        (
            lambda: Published((24,) * 12 + (1,), torch.nn.ReLU).state_dict(),  # layers.10 comes after layers.8
            "relu",
            lambda _, x: Published((24,) * 12 + (1,), torch.nn.ReLU).of(x),
        ),
        (lambda: Published((40, 1), inputs=16).half().state_dict(), "none", lambda _, x: Published((40, 1)).half().of(x)),
    ],
    ids=["linear", "no bias", "wrapped", "relu", "twelve", "half"],
)  # fmt: skip
def test_other_heads_are_read_by_their_shapes(paired_image, tmp_path, state, activation, plain):
    content = state()
    path = save(content, tmp_path / "head.pt")
    make_named_score(paired_image, NamedScoreRequest(name="h", head=path, activation=activation))
    x = embeddings(paired_image)
    expected = plain(
        {name: tensor.double() if hasattr(tensor, "double") else tensor for name, tensor in content.items()}, x
    )
    expected[77] = np.nan  # no embedding
    found = read(paired_image, "h")
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-7)
    assert np.isnan(found[77])


@pytest.fixture
def paired_image(small_catalog):
    """The small catalog without an embedding of row 77."""
    from tailwise.catalog.files import note_digest

    path = small_catalog.embedding_path("image", small_catalog.parts()[0])
    rows = np.load(path)
    rows[77] = 0
    np.save(path, rows)
    note_digest(path)
    return small_catalog


def test_heads_and_mixes_depend_on_neither_chunks_nor_threads_nor_parts(
    small_catalog, tmp_path, small_pieces, tree_bytes
):
    path = save(Published((64, 32, 1), torch.nn.ReLU).state_dict(), tmp_path / "head.pth")
    requests = [
        NamedScoreRequest(name="h", head=path, activation="relu"),
        NamedScoreRequest(name="m", mix="z(h) - 0.25 * z(caption-characters) / 3 + h"),
    ]

    def make():
        for request in requests:
            make_named_score(small_catalog, request)
        made = tree_bytes(small_catalog.folder / "named-scores")
        shutil.rmtree(small_catalog.folder / "named-scores")
        shutil.rmtree(small_catalog.folder / "scores")
        return made

    first = make()
    with small_pieces():
        assert make() == first
    assert len(first) >= 2 * 3


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (Published((8, 1)).state_dict(), {}, r"has 2 layers, and does not say what is between them: give `activation`, none or relu"),
        ({"weight": torch.zeros(1, 16)}, {"activation": "relu"}, "`activation` relu does nothing with .*: it has one layer"),
        ({"weight": torch.zeros(1, 16)}, {"activation": "tanh"}, "`activation` tanh: must be one of none, relu"),
        ({"weight": torch.zeros(1, 15)}, {}, "takes embeddings of 15 dimensions, and the catalog's have 16"),
        ({"weight": torch.zeros(2, 16)}, {}, "is no head: it has 2 outputs"),
        ({"weight": torch.zeros(16)}, {}, r"is no head: it has weight \[16\] and bias \[16\]"),
        ({"a.weight": torch.zeros(4, 16), "b.weight": torch.zeros(1, 5)}, {}, r"b.weight \[1, 5\] and b.bias \[1\], after 4 outputs"),
        ({"weight": torch.zeros(1, 16), "running_mean": torch.zeros(1)}, {}, "is no head: it has running_mean"),
        ({"weight": torch.full((1, 16), float("nan"))}, {}, "infinite, no number, or beyond"),
        ({"weight": torch.zeros(1, 16), "bias": torch.tensor([float("inf")])}, {}, "infinite, no number, or beyond"),
        ({"weight": torch.tensor(1.0)}, {}, r"is no head: it has weight \[\] and bias \[\];"),
        ({"0.weight": torch.zeros(0, 16), "1.weight": torch.zeros(1, 0)}, {}, r"is no head: it has 0.weight \[0, 16\]"),
        ({}, {}, "is no head: it has 0 outputs"),
        ({"weight": 3}, {}, "can't be read as weights"),
        (torch.nn.Linear(16, 1), {}, "can't be read as weights"),
        (None, {}, "is no file: give the weights"),
        (b"no weights", {}, "can't be read as weights"),
    ],
)  # fmt: skip
def test_other_files_are_no_heads(small_catalog, tmp_path, state, options, message):
    path = tmp_path / "head.pth"
    if isinstance(state, bytes):
        path.write_bytes(state)
    elif state is not None:
        torch.save(state, path)
    with pytest.raises(UserError, match=message) as caught:
        make_named_score(small_catalog, NamedScoreRequest(name="h", head=path, **options))
    assert "\n" not in str(caught.value)
    assert not (small_catalog.folder / "named-scores" / "h").exists()
    (tmp_path / "head.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match="can't be read as weights"):
        make_named_score(small_catalog, NamedScoreRequest(name="h", head=tmp_path / "head.safetensors"))


def test_a_head_that_changes_between_two_calls_is_read_again(small_catalog, tmp_path):
    context, path = Context(), tmp_path / "head.pth"
    for value in (1.0, 2.0):
        torch.save({"weight": torch.zeros(1, 16), "bias": torch.tensor([value])}, path)
        make_named_score(small_catalog, NamedScoreRequest(name="h", head=path), context)
        assert (read(small_catalog, "h") == value).all()
        delete(small_catalog, ["named-scores/h"])


# --- mixes --------------------------------------------------------------------------------------------------------------


def standardised(values, kept):
    kept = kept & ~np.isnan(values)
    wide = values.astype(np.float64)
    return (wide - wide[kept].mean()) / wide[kept].std()


def test_a_mix_is_the_sum_of_its_scores_standardised_over_the_kept_pool(small_catalog, tmp_path):
    random = np.random.default_rng(0)
    values = (random.normal(size=600) * 3 + 100).astype(np.float32)
    values[random.permutation(600)[:30]] = np.nan  # of one in twenty
    keys = [f"{row:06d}" for row in range(600)]
    pq.write_table(pa.table({"key": keys, "q": pa.array(values, from_pandas=True)}), tmp_path / "q.parquet")
    make_named_score(small_catalog, NamedScoreRequest(name="q", file=tmp_path / "q.parquet"))
    filter_samples(small_catalog, FilterRequest("image-bytes", keep=0.7, name="large"))
    np.save(tmp_path / "target.npy", embeddings(small_catalog)[:9])
    request = NamedScoreRequest(
        name="m",
        mix="0.7*z(q) + 0.3*z(normsim) - (normsim - 2) / 4e0",
        without=("large",),
        target=tmp_path / "target.npy",
        norm="inf",
    )
    summary = make_named_score(small_catalog, request)
    assert summary == {"samples": 600, "scored": 570}
    near = read(small_catalog, "normsim", target=str(tmp_path / "target.npy"), norm="inf")
    kept = ~np.asarray(DropList(small_catalog, "large").mask[:])
    plain = 0.7 * standardised(values, kept) + 0.3 * standardised(near, kept) - (near.astype(np.float64) - 2) / 4
    found = read(small_catalog, "m")
    np.testing.assert_allclose(found, plain, rtol=1e-6, atol=1e-7)
    assert np.array_equal(np.isnan(found), np.isnan(values))
    with pytest.raises(ConflictError, match="exists with other settings"):
        make_named_score(small_catalog, replace(request, without=()))
    with pytest.raises(ConflictError, match="exists with other settings"):
        make_named_score(small_catalog, replace(request, norm="2"))
    assert make_named_score(small_catalog, request) == summary
    # The two that it was made from keep their names.
    for name in ("named-scores/q", "drops/large"):
        with pytest.raises(ConflictError, match="named-scores/m was made from"):
            delete(small_catalog, [name])
    with pytest.raises(ConflictError, match="named-scores/m was made from embeddings/image"):
        delete(small_catalog, ["embeddings/image"])
    assert verify(small_catalog)[1] == [] and broken_inputs(small_catalog) == []


def test_moments_are_exact():
    random = np.random.default_rng(0)
    values = (random.normal(size=20_000) * 10.0 ** random.integers(-44, 30, 20_000)).astype(np.float32)
    from fractions import Fraction

    exact = [Fraction(float(value)) for value in values]
    mean = sum(exact) / len(exact)
    variance = sum(value * value for value in exact) / len(exact) - mean**2
    pieces = [exact_sums(values[start : start + 777]) for start in range(0, len(values), 777)]
    assert np.array_equal(sum(pieces), exact_sums(values))
    assert mean_and_deviation(exact_sums(values)) == (float(mean), float(variance) ** 0.5)


@pytest.mark.parametrize(
    "text",
    ["", "1 + 2", "1.5abc", "3.x", "2 024", "1e400*a",
     "__import__('os')", "a ** 2", "lambda: a", "z(z(a))", "z(1)", "z()", "f(a)", "a.b(c)", "[a]", "a if b else c",
     "a b", "x = 1", "a; b", "a\x00", "(" * 900, "-" * 1900 + "a", "a" * 2001, "9" * 1999 + "*a", "'a'", "a == b", "a @ b",
     "z(a, b)", "z(x=a)", "a{0}", "f'{a}'", "not a", "~a"],
)  # fmt: skip
def test_a_mix_is_numbers_names_and_four_operations(text):
    with pytest.raises(UserError, match="`mix` ") as caught:
        Mix(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_names_in_a_mix_may_hold_hyphens_and_dots():
    mix = Mix(" -z(clip-score) + 2e-1*a.b - z * .5 ")
    assert mix.names == ["clip-score", "a.b", "z"] and mix.standardised == {"clip-score"}
    other = Mix("z(3d)*2 - 1e1*2e + .5*1k-v2 - 3")
    assert other.names == ["3d", "2e", "1k-v2"]
    assert other({"3d": 4.0, "2e": 0.5, "1k-v2": 8.0}, {"3d": (1.0, 3.0)}) == 2 - 5 + 4 - 3
    assert mix({"clip-score": 5.0, "a.b": 10.0, "z": 4.0}, {"clip-score": (3.0, 4.0)}) == -0.5 + 2 - 2


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"mix": "z(width)"}, r"z\(width\): not one sample that takes part has a width"),
        ({"mix": "z(caption-words)"}, r"z\(caption-words\) means nothing: caption-words is 2 for all"),
        ({"mix": "caption-words - smell"}, "no score 'smell': use clip-score, .*, or a score that `tailwise score` named"),
        ({"mix": "caption-words", "norm": "2"}, "`norm` does nothing with the scores of `mix`: caption-words"),
        ({"mix": "caption-words", "without": ("none",)}, "no drop list named 'none'"),
        ({"mix": "caption-words", "name": "normsim"}, "`name` 'normsim' is the name of a score that there always is"),
        ({"mix": "caption-words", "name": "a/b"}, "'a/b' can't name an artifact"),
        ({"mix": "caption-words", "name": "ü" * 101}, "ü… can't name an artifact: it has 202 bytes, more than 200"),
        ({"mix": "z(inf)"}, r"z\(inf\) needs finite scores"),
        ({"mix": "x * 2 + caption-words"}, "`mix` .*: x is the name of the mix itself: give it another `name`"),
        ({"file": "header.csv"}, "not one of 600 samples would have the score 'x'"),
        ({"file": "none.jsonl"}, "not one of 600 samples would have the score 'x'"),
        ({"file": "list.txt"}, "list.txt holds no scores"),
        ({"file": "list.npy"}, "list.npy holds no scores"),
        ({"file": "none.csv"}, "none.csv is no file"),
        ({"file": "inf.csv", "match": "name"}, "`match` name: must be one of uid"),
        ({"file": "inf.csv", "strict": 2}, "`strict` 2: must be between 0 and 1"),
        ({"file": "s.json", "column": "q"}, "`column` q does nothing with .*s.json: it has no columns"),
        ({"file": "nested.json"}, "nested.json is not a JSON object of name → scores: the value of '000000' is no number"),
    ],
)  # fmt: skip
def test_a_bad_request_is_one_line(small_catalog, tmp_path, monkeypatch, request_, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("000000\n")
    np.save(tmp_path / "list.npy", np.zeros(3, "u8,u8"))
    (tmp_path / "inf.csv").write_text("key,inf\n000000,inf\n000001,1\n")
    (tmp_path / "header.csv").write_text("key,x\n")
    (tmp_path / "none.jsonl").write_text("".join(f'{{"key": "{row:06d}", "x": null}}\n' for row in range(600)))
    (tmp_path / "s.json").write_text('{"000000": 1}')
    (tmp_path / "nested.json").write_text('{"000000": [1]}')
    make_named_score(small_catalog, NamedScoreRequest(name="inf", file=tmp_path / "inf.csv"))
    given = {name: tmp_path / value if name == "file" else value for name, value in request_.items()}
    with pytest.raises(UserError, match=message) as caught:
        make_named_score(small_catalog, NamedScoreRequest(**{"name": "x", **given}))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (small_catalog.folder / "named-scores").glob("[!.]*")] == ["inf"]


# --- other settings, and status -----------------------------------------------------------------------------------------


def test_other_settings_are_named_as_the_user_typed_them(small_catalog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    catalog = small_catalog.folder
    save({"weight": torch.ones(1, 16)}, tmp_path / "h.pt")
    np.save("t.npy", embeddings(small_catalog)[:9])
    rows = "".join(["key,q,a-b\n", *(f"{row:06d},{row},{row}\n" for row in range(600))])
    for name, content in (("a.csv", rows), ("b.csv", rows), ("c.csv", "key,q\n000000,1\n")):
        (tmp_path / name).write_text(content)

    def score(name, *words):
        run("score", catalog, "--name", name, *words)

    def refused(*words):
        with pytest.raises(ConflictError) as caught:
            score(*words)
        return str(caught.value).partition(" exists with other settings ")[2].partition(": choose")[0]

    score("q", "--file", "a.csv")
    score("q", "--file", "b.csv")  # the content counts, not the path
    assert refused("q", "--mix", "image-bytes") == "(--file a.csv → not given, --mix not given → image-bytes)"
    assert refused("q", "--head", "h.pt") == "(--file a.csv → not given, --head not given → h.pt)"
    assert refused("q", "--file", "c.csv") == "(--file a.csv → c.csv)"
    assert refused("q", "--file", "a.csv", "--column", "a-b") == "(--column not given → a-b)"
    (tmp_path / "a.csv").write_text("key,q\n000000,1\n")
    assert refused("q", "--file", "a.csv") == "(score's file changed since)"
    score("h", "--head", "h.pt")
    assert refused("h", "--mix", "image-bytes") == "(--head h.pt → not given, --mix not given → image-bytes)"
    score("a-b", "--file", "b.csv")
    score("m", "--mix", "0.7*z(a-b)+ -image-bytes - q")
    score("m", "--mix", " 0.7 * z( a-b ) + - image-bytes -q")  # spaces do not count
    assert refused("m", "--file", "c.csv") == (
        "(--file not given → c.csv, --mix 0.7 * z(a-b) + - image-bytes - q → not given)"
    )
    score("n", "--mix", "z(normsim)", "--target", "t.npy")
    assert refused("n", "--mix", "z(normsim)", "--target", "t.npy", "--norm", "inf") == "(--norm 2 → inf)"
    run("filter", catalog, "--by", "q", "--keep", 0.5, "--name", "f")
    with pytest.raises(ConflictError, match=r"\(--by q → h\)"):
        run("filter", catalog, "--by", "h", "--keep", 0.5, "--name", "f")
    told = run("status", catalog)
    for line in (
        "q: file a.csv, snapshot 1, complete",
        "h: head h.pt, snapshot 1, complete",
        "m: mix 0.7 * z(a-b) + - image-bytes - q, snapshot 1, complete",
    ):
        assert f"  {line}\n" in told


def test_the_path_of_a_file_plays_no_role_for_what_is_made_from_the_score(small_catalog, tmp_path):
    rows = "".join(["key,q\n", *(f"{row:06d},{row}\n" for row in range(600))])
    ids = []
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(rows)
        run("score", small_catalog.folder, "--name", "q", "--file", tmp_path / name)
        ids.append(artifact_id(read_json(small_catalog.folder / "named-scores/q/manifest.json")))
        run("delete", small_catalog.folder, "named-scores/q")
    assert ids[0] == ids[1]


# --- who takes them -----------------------------------------------------------------------------------------------------


def run(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_filters_plans_and_dedups_take_a_named_score(small_catalog, tmp_path, make_pool):
    catalog, keys = small_catalog.folder, [f"{row:06d}" for row in range(600)]
    values = np.random.default_rng(1).permutation(600).astype(float)
    rows = ["key,mine", *(f"{key},{value}" for key, value in zip(keys[:570], values, strict=False))]
    (tmp_path / "s.csv").write_text("\n".join([*rows, *(f"nobody{at},1" for at in range(30))]))
    told = run("score", catalog, "--name", "q", "--file", tmp_path / "s.csv", "--column", "mine", "--strict", 0.95)
    assert "570 of 600 names in the file (95.0%) belong to samples, by key; these are 570 of 600 samples" in told
    assert f"next: tailwise filter {catalog} --dry-run --by q" in told
    assert (
        json.loads(run("score", catalog, "--name", "q", "--file", tmp_path / "s.csv", "--column", "mine", "--json"))[
            "names_matched"
        ]
        == 570
    )
    with pytest.raises(UserError, match="less than --strict 0"):
        run("score", catalog, "--name", "q", "--file", tmp_path / "s.csv", "--column", "mine", "--strict", 0.96)
    best = np.flatnonzero(values[:570] >= np.sort(values[:570])[-180])
    run("filter", catalog, "--by", "q", "--keep", 0.3)
    assert np.array_equal(np.flatnonzero(~np.asarray(DropList(small_catalog, "q").mask[:])), best)
    make_plan(small_catalog, "top", PlanRequest("top-score", score="q", keep=0.3))
    assert np.array_equal(np.flatnonzero(Plan(small_catalog, "top").draw(0)), best)
    cluster(small_catalog, ClusterRequest(k=4))
    dedup(small_catalog, DedupRequest(epsilon=0.05, order="score", score="q"))
    with pytest.raises(ConflictError, match="drops/duplicates, drops/q, plans/top were made from named-scores/q"):
        delete(small_catalog, ["named-scores/q"])
    with pytest.raises(UserError, match="`seed` does nothing with the score 'q'"):
        filter_samples(small_catalog, FilterRequest("q", 0, seed=1, name="x"))
    make_pool(tmp_path / "more", [5])
    import_pool([str(tmp_path / "more")], catalog, workers=1)
    with pytest.raises(
        UserError, match="the score 'q' was made for snapshot 1, and this is for 2: make one for that snapshot"
    ):
        filter_samples(Catalog.open(catalog), FilterRequest("q", 0, name="x"))


def test_the_request_says_which_options_do_nothing():
    for given, told in (
        ({}, "give one of `file` FILE, `head` FILE and `mix` EXPRESSION"),
        ({"file": "f", "mix": "a"}, "give one of"),
        ({"file": "f", "activation": "none"}, "`activation` does nothing with `file`"),
        ({"head": "f", "strict": 0.5}, "`strict` does nothing with `head`"),
        ({"head": "f", "without": ("a",)}, "`without` does nothing with `head`"),
        ({"mix": "a", "match": "key"}, "`match` does nothing with `mix`"),
    ):
        with pytest.raises(UserError, match=told):
            NamedScoreRequest(name="x", **given)
    with pytest.raises(UserError, match="`match` does nothing with `by`, without `file`"):
        FilterRequest("q", 0, match="key")
