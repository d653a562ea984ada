"""Delete and rename: dependants are known, an interruption leaves nothing broken, and what is deleted can be made again."""

import shutil
from pathlib import Path

import pytest

from tailwise.catalog import Catalog
from tailwise.catalog.embeddings import open_column, write_part
from tailwise.catalog.kinds import KINDS, PLAN
from tailwise.catalog.layout import MANIFEST
from tailwise.errors import ConflictError, NotFoundError, UnsupportedError, UserError
from tailwise.plan.plan import Plan
from tailwise.requests import (
    CaptionsRequest,
    ClusterRequest,
    ConceptsRequest,
    DedupRequest,
    EmbedRequest,
    FilterRequest,
    NamedScoreRequest,
    PlanRequest,
    ScoreRequest,
)
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.embedding.embed import embed
from tailwise.steps.grouping.concepts import make_concepts
from tailwise.steps.grouping.match import match_entries
from tailwise.steps.importing.captions import join_captions
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.filter import filter_samples
from tailwise.steps.scoring.named import make_named_score
from tailwise.steps.upkeep import delete as module
from tailwise.steps.upkeep.delete import delete, rename
from tailwise.steps.upkeep.status import status
from tailwise.steps.upkeep.verify import broken_inputs, verify
from tailwise.storage.local import locked

CLUSTERED = ["clusters/main", "drops/near", "drops/words", "plans/last", "plans/p"]  # and a comparison


@pytest.fixture(scope="module")
def _made(_small_catalog_source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(_small_catalog_source / "catalog", folder / "catalog")
    catalog = Catalog.open(folder / "catalog")
    for part in catalog.parts():
        open_column(catalog, "text", 16, "imported")
        write_part(catalog, "text", part, 16, [catalog.embedding("image", part)[:, :16]])
    embed(catalog, EmbedRequest(encoder="joint:image=0.5,text=0.5", column="joint"))
    cluster(catalog, ClusterRequest(k=12))
    dedup(catalog, DedupRequest(epsilon=0.01, name="near"))
    filter_samples(catalog, FilterRequest("caption-words", keep=0.9, name="words", without=("near",)))
    filter_samples(catalog, FilterRequest("caption-words", keep=0.5, name="alone"))
    dedup(catalog, DedupRequest(exact="bytes", name="same"))
    make_named_score(catalog, NamedScoreRequest(name="cosine", mix="clip-score - caption-words"))
    make_plan(catalog, "p", PlanRequest("dbp", keep=0.5))
    make_plan(catalog, "last", PlanRequest("random", keep=0.5, without=("words",)))
    make_plan(catalog, "top", PlanRequest("top-score", keep=0.3, score=ScoreRequest("image-bytes")))
    (folder / "entries.txt").write_text("group\n")
    match_entries(catalog, folder / "entries.txt", workers=1)
    make_concepts(catalog, [], ConceptsRequest(name="words", entries=folder / "entries.txt", workers=1))
    (folder / "captions.tsv").write_text("key\tcaption\n000001\tone\n")
    join_captions(catalog, [folder / "captions.tsv"], CaptionsRequest(name="recap"))
    filter_samples(catalog, FilterRequest("caption-words", minimum=0, missing="keep", name="recap", captions="recap"))
    return catalog.folder


@pytest.fixture
def made(_made, tmp_path):
    """A catalog with artifacts that were made from others."""
    shutil.copytree(_made, tmp_path / "catalog")
    return Catalog.open(tmp_path / "catalog")


def listed(catalog):
    """Folder and name of all that is finished, caches aside."""
    found = {path.parent.relative_to(catalog.folder).as_posix() for path in catalog.folder.glob(f"*/*/{MANIFEST}")}
    found |= {
        path.parent.relative_to(catalog.folder).as_posix() for path in catalog.folder.glob("embeddings/*/column.json")
    }
    caches = {kind.folder for kind in KINDS if not kind.made_by}
    return {name for name in found if name.split("/")[0] not in caches}


def assert_sound(catalog):
    assert verify(catalog)[1] == []
    assert broken_inputs(catalog) == []
    status(catalog)


def test_what_was_made_from_it_is_named_and_goes_first(made):
    before = listed(made)
    with pytest.raises(ConflictError) as caught:
        delete(made, ["clusters/main"])
    assert all(name in str(caught.value) for name in CLUSTERED[1:])
    assert "drops/alone" not in str(caught.value) and "neighbours" not in str(caught.value)
    assert listed(made) == before
    trial = delete(made, ["clusters/main"], with_dependants=True, dry_run=True)
    assert listed(made) == before
    assert delete(made, ["clusters/main"], with_dependants=True) == trial
    names = [item.name for item in trial]
    assert names[-1] == "clusters/main"
    assert names.index("plans/last") < names.index("drops/words") < names.index("drops/near")
    assert {name for name in names if not name.startswith("neighbours/")} == set(CLUSTERED)
    assert len(names) == len(CLUSTERED) + 1
    assert before - listed(made) == set(CLUSTERED)
    assert all(item.size_bytes > 0 for item in trial)
    assert_sound(made)


@pytest.mark.parametrize(
    ("name", "users"),
    [
        ("embeddings/image", {"embeddings/joint", "named-scores/cosine", *CLUSTERED}),
        ("embeddings/text", {"embeddings/joint", "named-scores/cosine"}),
        ("embeddings/joint", set()),
        ("captions/recap", {"drops/recap"}),
        ("drops/words", {"plans/last"}),
        ("plans/top", set()),
    ],
)
def test_dependants_are_found_by_what_manifests_name(made, name, users):
    if users:
        with pytest.raises(ConflictError) as caught:
            delete(made, [name])
        assert all(user in str(caught.value) for user in users)
    before = listed(made)
    delete(made, [name, *sorted(users)])  # named, they may go
    assert before - listed(made) == {name, *users}
    assert_sound(made)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.section)
def test_each_kind_can_be_deleted(made, kind):
    name = kind.finished(made.folder)[0]
    size = sum(path.stat().st_size for path in kind.path(made.folder, name).rglob("*") if path.is_file())
    found = delete(made, [f"{kind.folder}/{name}"], with_dependants=True)
    assert found[-1].name == f"{kind.folder}/{name}" and found[-1].size_bytes == size
    assert name not in kind.finished(made.folder) and not kind.path(made.folder, name).exists()
    assert_sound(made)


def test_what_was_deleted_is_made_again_with_the_same_bytes(made, tree_bytes):
    before = tree_bytes(made.folder / "clusters"), tree_bytes(made.folder / "plans" / "p")
    delete(made, ["clusters/main"], with_dependants=True)
    cluster(made, ClusterRequest(k=12))
    make_plan(made, "p", PlanRequest("dbp", keep=0.5))
    assert (tree_bytes(made.folder / "clusters"), tree_bytes(made.folder / "plans" / "p")) == before


def test_what_an_interruption_leaves_is_sound_and_is_deleted_by_the_next_call(made, monkeypatch, tmp_path):
    """Wherever it ends: at each file or folder that it removes."""
    unlink, remove, goal = Path.unlink, module.remove_folder, None
    for last in range(60):
        folder = tmp_path / f"catalog-{last}"
        shutil.copytree(made.folder, folder)
        catalog, left = Catalog.open(folder), [last]

        def counted(of):
            def call(*args, **options):
                if left[0] == 0:  # noqa: B023
                    raise KeyboardInterrupt
                left[0] -= 1  # noqa: B023
                return of(*args, **options)

            return call

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", counted(unlink))
            patched.setattr(module, "remove_folder", counted(remove))
            try:
                delete(catalog, ["embeddings/image"], with_dependants=True)
            except KeyboardInterrupt:
                pass
            else:
                break
        # A column that is half deleted is one that is half made.
        assert all("embeddings" in path.parts for path in verify(catalog)[1])
        assert broken_inputs(catalog) == []
        assert {item["state"] for item in status(catalog)["plans"]} <= {"complete"}
        try:
            delete(catalog, ["embeddings/image"], with_dependants=True)
        except NotFoundError:  # all of it was gone
            assert not (folder / "embeddings" / "image").exists()
        goal = goal or listed(catalog)
        assert_sound(catalog)
        assert listed(catalog) == goal
        assert not [path for path in (folder / "plans").iterdir() if path.is_dir() and path.name in {"p", "last"}]
        shutil.rmtree(folder)
    assert 10 < last < 59


def test_an_unfinished_artifact_is_a_dependant_and_can_be_deleted(made, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("tailwise.catalog.artifacts.Artifact.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_plan(made, "half", PlanRequest("random", keep=0.5, without=("alone",)))
    with pytest.raises(ConflictError, match="plans/half was made from drops/alone"):
        delete(made, ["drops/alone"])
    with pytest.raises(NotFoundError, match="plans/half is unfinished"):
        rename(made, "plans/half", "other")
    delete(made, ["plans/half"])
    assert PLAN.unfinished(made.folder) == []
    delete(made, ["drops/alone"])


def test_wrong_names_are_refused(made):
    for name, error, words in (
        ("snapshots/1", UnsupportedError, "snapshots can't be deleted"),
        ("samples/part-000000", UnsupportedError, "tailwise remove"),
        ("plans", UserError, "give KIND/NAME"),
        ("plans/", UserError, "give KIND/NAME"),
        ("nothing/p", UserError, "clusters"),
        ("plans/../clusters", UserError, "can't name an artifact"),
        ("plans/q", NotFoundError, "there is no plans/q"),
        ("plans/lst", NotFoundError, "did you mean 'plans/last'"),
    ):
        with pytest.raises(error, match=words):
            delete(made, [name], with_dependants=True)
        with pytest.raises(error, match=words):
            rename(made, name, "new")


def test_nothing_is_deleted_while_it_is_written(made):
    before = listed(made)
    with locked(made.folder / "drops" / ".near.lock", "near"), pytest.raises(ConflictError, match="drops/near"):
        delete(made, ["clusters/main"], with_dependants=True)
    with locked(made.folder / ".lock", "catalog"), pytest.raises(ConflictError, match="embeddings/joint"):
        delete(made, ["embeddings/joint"])
    assert listed(made) == before


def test_a_renamed_plan_is_the_same_plan(made):
    plan = Plan(made, "p")
    drawn, identity = plan.draw(3).tolist(), plan.id
    assert rename(made, "plans/p", "q") == "plans/q"
    again = Plan(made, "q")
    assert (again.draw(3).tolist(), again.id) == (drawn, identity)
    made_of = again.folder.stat().st_ino
    make_plan(made, "q", PlanRequest("dbp", keep=0.5))  # done: nothing is made
    assert Plan(made, "q").folder.stat().st_ino == made_of
    with pytest.raises(UserError, match="no plan named 'p'"):
        Plan(made, "p")
    assert_sound(made)


def test_renaming_is_refused_where_others_know_the_name(made):
    hashes = next(kind for kind in KINDS if kind.folder == "hashes")
    for name, new, error, words in (
        ("clusters/main", "m", ConflictError, "drops/near"),
        ("captions/recap", "c", ConflictError, "drops/recap"),
        ("embeddings/text", "t", ConflictError, "embeddings/joint"),
        ("plans/p", "last", ConflictError, "plans/last exists"),
        ("plans/p", "a/b", UserError, "can't name"),
        ("embeddings/joint", "text", ConflictError, "has to be of text"),
        (f"hashes/{hashes.finished(made.folder)[0]}", "h", UnsupportedError, "can't be renamed"),
    ):
        with pytest.raises(error, match=words):
            rename(made, name, new)
    rename(made, "embeddings/joint", "both-sides")
    cluster(made, ClusterRequest(k=5, column="both-sides", name="joined"))
    assert_sound(made)
