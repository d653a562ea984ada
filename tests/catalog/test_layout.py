"""One module spells the names of a catalog's files: with other names in it, every command does the same."""

import ast
import json
import random
import re
import string
from pathlib import Path

import numpy as np
import pytest

import tailwise
from tailwise.catalog import layout

PACKAGE = Path(tailwise.__file__).parent
NAMES = {name: value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}

# --- other names ------------------------------------------------------------------------------------------------------

CHAIN = r'''
import contextlib, io, json, os, sys
from pathlib import Path

os.chdir(sys.argv[2])
sys.path.insert(0, sys.argv[3])
for name in [name for name in sys.modules if name.split(".")[0] == "tailwise"]:
    del sys.modules[name]  # they know the true names

import numpy as np

from tailwise.cli import main
from tailwise.catalog import Catalog, layout
from tailwise.catalog.clusterings import Clustering
from tailwise.loader.loader import Loader
from tailwise.loader.webdataset import select
from tailwise.plan import Plan

import tailwise

assert Path(tailwise.__file__).is_relative_to(sys.argv[3])
sources = Path(sys.argv[1])
told, found = {}, {}


def do(*words):
    sys.argv = ["tailwise", *map(str, words)]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main()
    except SystemExit as end:
        assert not end.code, out.getvalue()
    told[" ".join(sys.argv[1:])] = out.getvalue()


def numbers(array):
    return np.nan_to_num(np.asarray(array).astype(np.float64), nan=-7).tolist()


one = ("--workers", 1)
do("import", sources / "pool", sources / "embeddings", "catalog", "--json", "--workers", 2)
do("import", sources / "pool", "pixels", *one)
do("embed", "pixels", "--encoder", "pixels", *one)
told.popitem()  # it tells how long it took
do("cluster", "catalog", "--k", 6, "--density", "auto", "--json")
do("dedup", "catalog", "--suggest", "--json")
do("dedup", "catalog", "--epsilon", 0.01, "--json")
do("dedup", "catalog", "--exact", "bytes", "--name", "same", "--json")
do("captions", "catalog", sources / "languages.tsv", "--name", "spoken", "--by", "key", "--column", "language", "--json")
do("concepts", "catalog", "--name", "words", "--entries", sources / "entries.txt", "--json", *one)
do("filter", "catalog", "--by", "caption-words", "--keep", 0.9, "--json")
do("filter", "catalog", "--by", "cliploss", "--keep", 0.5, "--batch-size", 50, "--without", "duplicates")
do("filter", "catalog", "--by", "votes", "--file", sources / "votes.tsv", "--keep", 0.9)
do("score", "catalog", "--name", "mixed", "--mix", "caption-words + 2*z(cliploss)", "--batch-size", 50, "--json")
do("group", "catalog", "--by", "language", "--file", sources / "languages.tsv")
do("group", "catalog", "--entries", sources / "entries.txt", "--json")
do("plan", "catalog", "subset", "--method", "dbp", "--keep", 0.5, "--json")
do("plan", "catalog", "epochs", "--method", "dynamics", "--alpha", 0, "--alpha-end", 1, "--anneal-epochs", 3, "--keep", 0.4,
   "--without", "duplicates")
do("plan", "catalog", "best", "--method", "top-score", "--score", "caption-words", "--keep", 0.3)
do("plan", "catalog", "languages", "--method", "flat", "--clustering", "language", "--keep", 0.5)
do("plan", "catalog", "theirs", "--rates", sources / "rates.json", "--json")
do("plan", "catalog", "balanced", "--entries", sources / "entries.txt", "--per-entry", 9, "--json")
do("plan", "catalog", "thinned", "--concepts", "words", "--per-entry", 9, "--json")
do("plan", "catalog", "imported", "--method", "proportional", "--clustering", "dynamics", "--keep", 0.5)
plans = ("subset", "epochs", "best", "languages", "theirs", "balanced", "imported")
for name in plans:
    do("explain", "catalog", name, "--json", *(["--by-cluster"] if name not in ("theirs", "balanced") else []))
do("draw", "catalog", "epochs", "--epoch", 2, "--output", "draw.parquet")
do("export", "catalog", "subset", "--to", "datacomp", "--output", "subset.npy")
do("export", "catalog", "epochs", "--to", "rates-json", "--epoch", 1, "--output", "rates.json")
do("export", "catalog", "subset", "--to", "keys", "--output", "keys.txt")
do("export", "catalog", "epochs", "--to", "shards", "--epoch", 0, "--output", "shards", *one)
do("excluded", "catalog", "--output", "dropped.parquet", "--json")
do("excluded", "catalog", "epochs", "--epochs", 2, "--output", "excluded.parquet", "--json")
do("remove", "catalog", "--keys", sources / "removed.txt", "--json")
do("import", sources / "more", sources / "more-embeddings", "catalog", *one)
do("cluster", "catalog", "--extends", "main", "--name", "main-2")
do("dedup", "catalog", "--epsilon", 0.01, "--clustering", "main-2", "--extends", "duplicates", "--name", "duplicates-2")
do("relocate", "catalog", sources / "pool", sources / "moved")
do("status", "catalog", "--json")
do("verify", "catalog", "--json")
for key in ("a0003", "a0004", "a0011", "b0007", "faulty"):
    do("why", "catalog", key, "--json")
Path("recipe.yaml").write_text("""
name: test
about: a test
source: ours
expect: {samples: few}
catalog: catalog
output: exported
steps:
  - plan: {name: uniform, method: random, keep: 0.5}
  - export: {name: uniform, to: datacomp, epoch: 1, output: uniform.npy}
""")
do("run", "recipe.yaml", "--json")
do("run", "recipe.yaml", "--json")

catalog = Catalog.open("catalog")
for name in ("main", "main-2", "language", "entries", "dynamics"):
    made = Clustering.open(catalog, name)
    columns = ("LABEL", "RANK", "SIMILARITY") if made.has_centroids else ("LABEL", "RANK")
    found[name] = [numbers(part) for column in columns for part in made.parts(getattr(layout, column))]
    found[name + " table"] = made.table.to_pylist()
for name in plans:
    plan = Plan(catalog, name)
    found[name] = [numbers(plan.draw(epoch)) for epoch in (0, 1, 4)]
pixels = Catalog.open("pixels")
found["pixels"] = [numbers(block) for block in pixels.embedding_parts("image", pixels.snapshot())]
loader = Loader(Plan(catalog, "epochs"), batch_size=8, first_epoch=2)
batches = iter(loader)
found["batches"] = [next(batches).rows.tolist() for _ in range(2 * len(loader) if hasattr(loader, "__len__") else 12)]
samples = [{"__url__": str(path), "__key__": key} for path, key in json.loads((sources / "samples.json").read_text())]
found["passed"] = [sample["__key__"] for sample in select(Plan(catalog, "epochs"), unknown="drop")(samples)]
told["rejected"] = json.dumps(sorted(catalog.rejected().to_pylist(), key=json.dumps))
json.dump({"told": told, "found": found}, Path("result.json").open("w"), sort_keys=True, default=str)
'''


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_tar, make_image, make_partition):
    """A pool of 160 samples, one of 40 that comes later, embeddings of both sides, and files that commands take."""
    folder = tmp_path_factory.mktemp("sources")
    generator = np.random.default_rng(11)
    groups = generator.permutation(np.repeat(np.arange(6), [90, 40, 30, 20, 12, 8]))
    axes = np.linalg.qr(generator.normal(size=(8, 8)))[0]
    keys = [f"{'a' if row < 160 else 'b'}{row % 160:04d}" for row in range(200)]
    rows = axes[groups] + generator.normal(scale=0.2, size=(200, 8))
    rows[11] = np.nan
    rows[40:44] = rows[3]
    images = [make_image(group) for group in range(6)]
    samples = []
    for shard, (start, stop) in enumerate(((0, 60), (60, 120), (120, 160), (160, 200))):
        place = folder / ("pool" if shard < 3 else "more") / f"{shard:05d}.tar"
        members = [
            member
            for row in range(start, stop)
            for member in (
                (f"{keys[row]}.jpg", images[groups[row]]),
                (f"{keys[row]}.txt", f"group {groups[row]} number {row % 7}".encode()),
                (f"{keys[row]}.json", json.dumps({"uid": f"{row:032x}", "width": 8, "height": 8}).encode()),
            )
        ]
        make_tar(place, [*members, *([("faulty.txt", b"no image")] if shard == 0 else [])])
        samples += [(place, key) for key in keys[start:stop]]
    (folder / "moved").symlink_to(folder / "pool")
    for column, sign in (("image", 1), ("text", -1)):
        make_partition(folder / "embeddings", 0, keys[:160], (sign * rows[:160]).astype(np.float32), column)
        make_partition(folder / "more-embeddings", 0, keys[160:], (sign * rows[160:]).astype(np.float32), column)
    np.save(folder / "embeddings" / "img_emb" / "img_emb_0_indices.npy", groups[:160].astype(np.int64))
    for name, values in (("languages", [("de", "en", "fr")[row % 3] for row in range(160)]), ("votes", range(160))):
        lines = [f"{key}\t{value}" for key, value in zip(keys, values, strict=False)]
        (folder / f"{name}.tsv").write_text("\n".join([f"key\t{name.removesuffix('s')}", *lines, ""]))
    (folder / "votes.tsv").write_text((folder / "votes.tsv").read_text().replace("vote\n", "votes\n", 1))
    (folder / "entries.txt").write_text("group 0\ngroup 1\ngroup 2\nnumber 3\nabsent\n")
    (folder / "rates.json").write_text(json.dumps({key: row % 4 / 2 for row, key in enumerate(keys[:160])}))
    (folder / "removed.txt").write_text("a0005\na0077\nb0001\n")
    (folder / "samples.json").write_text(json.dumps([(str(place), key) for place, key in samples]))
    return folder


def package_with(folder, text):
    """The package, with another text of the module of names; all other modules are the same files."""
    (folder / "tailwise" / "catalog").mkdir(parents=True)
    for of in (PACKAGE, PACKAGE / "catalog"):
        for item in of.iterdir():
            place = folder / "tailwise" / item.relative_to(PACKAGE)
            if item.name not in {"layout.py", "__pycache__"} and not place.exists():
                place.symlink_to(item)
    (folder / "tailwise" / "catalog" / "layout.py").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def begin(fork_python, sources):
    """`begin(folder, text)` starts the chain of commands in a process that knows the names of this text."""

    def begin(folder, text):
        folder.mkdir()
        package = package_with(folder.parent / f"{folder.name}-package", text)
        return fork_python(CHAIN, sources, folder, package, out=folder.parent / f"{folder.name}.log")

    return begin


def renamed(text, seed=5):
    """The text with random words in all names, and what each word stands for."""
    draw = random.Random(seed)
    words = {}

    def other(found):
        word = "".join(draw.choices(string.ascii_lowercase, k=9))
        words[word] = found[0]
        return word

    for name, value in NAMES.items():
        line = re.search(rf'^{name} = "{re.escape(value)}"', text, re.MULTILINE)
        assert line, f"{name} is not spelled on a line of its own"
        text = text.replace(line[0], f'{name} = "{re.sub("[a-z_]+", other, value)}"', 1)
    return text, words


def plainly(text, folder, words):
    """Lines that a run has told, less folders, times and hashes (of manifests, which hold names), in the true words."""
    text = re.sub("|".join(words), lambda found: words[found[0]], text) if words else text
    text = re.sub(r"[0-9a-f]{32}|[0-9a-f]{12}(?=/|\")", "#", text.replace(str(folder), ""))
    return sorted(re.sub(r"\d+(\.\d+)? s\b", "# s", text).splitlines())  # some are listed by hash


@pytest.mark.slow
def test_every_command_does_the_same_under_other_names(begin, tmp_path, tree_bytes):
    text = Path(layout.__file__).read_text(encoding="utf-8")
    other_text, words = renamed(text)
    folders = {"real": tmp_path / "real", "other": tmp_path / "other"}
    begun = [(begin(folder, names), folder) for folder, names in zip(folders.values(), (text, other_text), strict=True)]
    for process, folder in begun:
        process.join()
        assert process.exitcode == 0, (tmp_path / f"{folder.name}.log").read_text()
    real, other = (json.loads((folder / "result.json").read_text()) for folder in folders.values())
    assert real["found"] == other["found"]
    assert real["told"].keys() == other["told"].keys()
    for command, said in real["told"].items():
        assert plainly(said, folders["real"], {}) == plainly(other["told"][command], folders["other"], words), command
    exports = [
        {name: content for name, content in tree_bytes(folder).items() if name.startswith(("shards/", "exported/"))}
        | {name: (folder / name).read_bytes() for name in OUTPUTS}
        for folder in folders.values()
    ]
    plan = re.compile(rb"[0-9a-f]{32}")
    assert {name: plan.sub(b"#", content) for name, content in exports[0].items()} == {
        name: plan.sub(b"#", content) for name, content in exports[1].items()
    }
    assert sum(name.endswith(".tar") for name in exports[0]) >= 1
    there = {piece for path in (folders["other"] / "catalog").rglob("*") for piece in re.findall("[a-z_]+", path.name)}
    spelled = there & set(words.values()) - USERS
    assert not spelled
    spelled_there = re.findall(r'^([A-Z_]+) = "(.*?)"', other_text, re.MULTILINE)
    assert {name for name, value in spelled_there if not there & {*re.findall("[a-z_]+", value)}} == UNSEEN


OUTPUTS = ("draw.parquet", "subset.npy", "rates.json", "keys.txt", "dropped.parquet", "excluded.parquet")
# What is gone when a command has ended, and lists of what this pool gives no cause for.
UNSEEN = {"MEMBERS", "FATE", "PENDING", "UNFINISHED", "SHARD", "JOINING", "TRAINING", "DENSITY", "WORK"}
UNSEEN |= {"ORIGIN", "MISSING"}  # of plans of a bundle
UNSEEN |= {"PAIRS", "REPETITION", "SPILL", "SOURCES_LOG", "SCORES_LOG", "CLUSTER_IDS_LOG", "EMBED_LOG"}
USERS = {"entries", "text"}  # names that the commands of the chain give

# --- no other spelling ------------------------------------------------------------------------------------------------

FORMATS = {layout.RECORD, layout.ARRAY, layout.TABLE}  # of files of any kind, the user's among them
FILES = {value for value in NAMES.values() if "." in value[1:] or value.endswith("-")}
WORDS = {*NAMES.values()} - FILES - FORMATS
COLUMNS = {f"{value}-" for value in WORDS} | {f"{value}-{layout.PART}" for value in WORDS}
# Other folders than a catalog: their files have the same names, and are spelled where they are.
HOMONYMS = {
    ("compare/images.py", ".lock"),
    ("compare/study.py", ".lock"),
}


def pieces(node):
    """The constant texts of a string or an f-string."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return [item.value for item in parts if isinstance(item, ast.Constant) and isinstance(item.value, str)]


def spelled(tree):
    """(line, name) of each name of a file in a string; of each word that is a name only as a piece of a path."""
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if ast.get_docstring(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in documented:
            for text in pieces(node):
                words = re.split(r"[/\s(){}'\"]", text)
                yield from ((node.lineno, name) for name in FILES if name in words)
                yield from ((node.lineno, name) for name in FILES if name[-1] == "-" and text.startswith(name))
                if isinstance(node, ast.JoinedStr):
                    yield from ((node.lineno, text) for name in COLUMNS if text == name)
                    yield from ((node.lineno, name) for name in WORDS if re.search(rf"(^|/|folder ){name}/", text))
        in_path = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            in_path = [node.left, node.right]
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            in_path = node.args if name in {"path", "joinpath", "with_name", "glob", "rglob", "series", "Path"} else []
        for item in in_path:
            for text in pieces(item):
                yield from ((node.lineno, name) for name in WORDS if name in text.split("/"))


def test_no_other_module_spells_a_name():
    found = [
        (path.relative_to(PACKAGE).as_posix(), line, name)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != Path(layout.__file__)
        for line, name in spelled(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert [f"{path}:{line}: {name}" for path, line, name in found if (path, name) not in HOMONYMS] == []
    assert {(path, name) for path, _, name in found} == HOMONYMS  # those that are listed are there


def test_a_spelled_name_is_found():
    bad = [
        'folder / "clusters" / name',
        'artifact.path("centroids.npy")',
        'f"label-{part.name}.npy"',
        'f"{kind}/manifest.json is missing"',
        'folder.glob("part-*.json")',
        'f"delete the folder embeddings/{column}"',
        'catalog.series("snapshots")',
        'folder / f"part-{number:06d}.json"',
    ]
    good = ['summary["clusters"]', '"the clusters are"', 'f"{count} embeddings"', 'def f():\n "Writes centroids.npy."']
    assert [text for text in bad if not [*spelled(ast.parse(text))]] == []
    assert [text for text in good if [*spelled(ast.parse(text))]] == []


def test_no_two_names_of_one_folder_are_the_same():
    top = ("SHARDS", "SAMPLES", "LOCATIONS", "EXPORTS", "SNAPSHOTS", "REMOVALS", "REJECTED", "EMBEDDINGS", "HEADER")
    kinds = ("CLUSTERINGS", "SCORES", "COMPARISONS", "MATCHES", "DROP_LISTS", "PLANS")
    assert len({NAMES[name] for name in (*top, *kinds)}) == len(top) + len(kinds)
