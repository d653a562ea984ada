"""Which members of a tar are image and caption: suffixes, fields of the JSON, orders of preference."""

import io
import json
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailwise.catalog import Catalog
from tailwise.errors import ConflictError, UserError
from tailwise.plan.plan import Plan
from tailwise.requests import PlanRequest, SourceRequest
from tailwise.shards.columns import MAX_TEXT_BYTES
from tailwise.shards.members import MemberChoice, json_caption, text_at
from tailwise.shards.webdataset import read_shard
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan


@pytest.fixture
def read(tmp_path, make_tar):
    """`read(members, image=None, caption=None)` → captions by key, the images' extensions, and reasons with details."""

    def run(members, image=None, caption=None):
        path = make_tar(
            tmp_path / "0.tar",
            [(name, value if isinstance(value, bytes) else value.encode()) for name, value in members],
        )
        content = read_shard(str(path), MemberChoice.given(image, caption))
        assert content.members.seen == content.members.imported + content.members.harmless + content.members.rejected
        rows = content.samples.to_pylist()
        found = {row["key"]: (row["caption"], row["image_extension"]) for row in rows}
        return found, [(row["reason"], row["key"], row["detail"], row["rows"]) for row in content.rejected.to_pylist()]

    return run


def described(text, **more):
    return json.dumps({"alt": {"text": text}, **more})


def test_suffixes_are_all_behind_the_key(read):
    members = [
        ("x/a.input.jpg", "i"),
        ("x/a.outputs.txt", "caption"),
        ("x/a.mask.png", "m"),
        ("b.1.input.jpg", "i"),
        ("b.1.outputs.txt", "b"),
    ]
    found, reasons = read(members, "input.jpg", ".Outputs.TXT")
    assert found == {"x/a": ("caption", "jpg"), "b.1": ("b", "jpg")} and not reasons
    found, reasons = read(members)
    assert not found and {reason for reason, *_ in reasons} == {
        "image without caption",
        "caption without image",
    }


def test_the_preferred_member_with_content_is_taken(read):
    members = [
        *[("a.jpg", "i"), ("a.png", "i"), ("a.txt", ""), ("a.json", described("of a"))],
        *[("b.png", "i"), ("b.txt", "of b"), ("b.json", "{}")],
        *[("c.jpg", ""), ("c.png", "i"), ("c.txt", ""), ("c.json", "no JSON")],
        *[("d.jpg", "i"), ("d.json", described(7))],
    ]
    found, reasons = read(members, "jpg,png", "txt,json:alt.text")
    assert found == {"a": ("of a", "jpg"), "b": ("of b", "png"), "c": ("", "png")}
    assert ("no caption in the JSON", "d", "no text at alt.text", 1) in reasons
    assert ("several images, the first kind is taken", None, ".jpg, .png; `image` chooses another order", 1) in reasons
    assert read(members, "png,jpg", "json:alt.text,txt")[0]["a"] == ("of a", "png")


def test_captions_in_json_are_as_hostile_as_others(read):
    members = []
    for key, text in (("a", "x" * (MAX_TEXT_BYTES + 1)), ("b", "\ud800"), ("c", ["x"]), ("d", "é\n")):
        members += [(f"{key}.jpg", "i"), (f"{key}.json", described(text))]
    found, reasons = read(
        [*members, ("e.jpg", "i"), ("e.json", b"\xff"), ("f.jpg", "i"), ("f.json", "[" * 100_000)],
        None,
        "json:alt.text",
    )
    assert found == {"d": ("é\n", "jpg")}
    whys = {key: reason for reason, key, *_ in reasons if key}
    assert whys == {"a": "caption is too long", "b": "caption is not UTF-8"} | dict.fromkeys(
        "cef", "no caption in the JSON"
    )


NAMES = st.builds(
    lambda key, suffix: f"{key}.{suffix}",
    st.sampled_from(["a", "a.b", "x/a", "b"]),
    st.sampled_from(["jpg", "JPG", "in.jpg", "b.in.jpg", "png", "txt", "out.txt", "b.out.txt", "json", "cls", ""]),
)
CHOICES = [
    (None, None),
    ("in.jpg", "out.txt"),
    ("png,in.jpg,jpg", "json:c,out.txt"),
    ("b.in.jpg", "txt"),
    ("JPG", "json:c"),
]


@given(st.lists(NAMES, max_size=12), st.sampled_from(CHOICES))
def test_samples_have_chosen_members_of_their_key(names, chosen):
    choice = MemberChoice.given(*chosen)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number, name in enumerate(names):
            content = json.dumps({"c": f"{number}"} if number % 3 else {}).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        path.write_bytes(stream.getvalue())
        content = read_shard(str(path), choice)
    counts = content.members
    assert counts.seen == len(names) == counts.imported + counts.harmless + counts.rejected
    stream.seek(0)
    with tarfile.open(fileobj=stream) as tar:
        at = {member.offset_data: member.name for member in tar.getmembers()}
    for row in content.samples.to_pylist():
        image, caption = at[row["image_offset"]], at[row["caption_offset"]]
        assert any(image.lower() == f"{row['key']}.{suffix}" for suffix in choice.images)
        assert any(caption.lower() == f"{row['key']}.{suffix}" for suffix in choice.texts)
        text = stream.getvalue()[row["caption_offset"] :][: row["caption_bytes"]]
        assert row["caption"] == (json_caption(text, choice.fields) if caption.endswith("json") else text).decode()


@pytest.mark.parametrize("extension", ["tif", "bmp", "gif", "avif", "0.jpg"])
def test_other_images_have_a_remedy(read, extension):
    members = [(f"a.{extension}", "i"), ("a.txt", "c")]
    (reason,) = read(members)[1]
    assert reason[0] == "image has another suffix" and f"there is .{extension}" in reason[2] and "`image`" in reason[2]
    assert read(members, extension)[0] == {"a": ("c", extension.removeprefix("0."))}


@pytest.mark.parametrize(
    ("image", "caption", "said"),
    [
        ("jpg,,png", None, "`image` 'jpg,,png'"), ("json:a", None, "json:FIELD"), (None, "json", "json:FIELD"), ("jpg,JPG", None, "twice"),
        (None, "json:a..b", "json:OUTER.INNER"), ("jpg", "txt,jpg", "as `caption`"), ("a/b.jpg", None, "no suffix"),
        (None, "", "no suffix"),
    ],
)  # fmt: skip
def test_impossible_suffixes_are_refused(image, caption, said):
    with pytest.raises(UserError, match=said):
        MemberChoice.given(image, caption)


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab0"), inner, max_size=3),
    max_leaves=9,
)


@given(
    JSONS,
    st.lists(
        st.lists(st.sampled_from(["a", "b", "0", "1"]), min_size=1, max_size=3).map(".".join), min_size=1, max_size=3
    ),
)
def test_a_caption_is_found_again_in_its_json(value, fields):
    texts = [text for field in fields if (text := text_at(value, field)) is not None]
    content = json.dumps(value).encode()
    if texts:
        assert json_caption(content, tuple(fields)).decode() == next((text for text in texts if text), "")
    else:
        with pytest.raises(OSError, match="no caption"):
            json_caption(content, tuple(fields))


# --- from the import to all that reads captions -------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path, make_tar, make_image):
    """`shards(first)` writes a tar of 24 samples: of three, one has its caption in the JSON, apart from its image."""

    def write(first):
        images, rest = [], []
        for row in range(first, first + 24):
            images.append((f"{row:03d}.input.png", make_image(row, "PNG")))
            text = ("outputs.txt", f"text {row}") if row % 3 else ("json", described(f"json {row}", filler="x" * 5000))
            rest.append((f"{row:03d}.{text[0]}", text[1].encode()))
        return make_tar(tmp_path / "shards" / f"{first:03d}.tar", images + rest)

    return write


CHOICE = SourceRequest(image="input.png", caption="outputs.txt,json:alt.text")


def test_a_choice_holds_for_the_catalog(tmp_path, shards, make_embeddings):
    shards(0)
    make_embeddings(tmp_path / "embeddings", {"000": np.ones(4)})
    with pytest.raises(UserError, match="with `image` and `caption`"):
        import_pool(tmp_path / "shards", tmp_path / "none")
    made = import_pool(tmp_path / "shards", tmp_path / "pool", options=CHOICE)
    assert made.new_samples == 24 and not made.rejections.counts
    shards(24)
    for other in (SourceRequest(image="png"), SourceRequest(caption="txt")):
        with pytest.raises(ConflictError, match="were imported with"):
            import_pool(tmp_path / "shards", tmp_path / "pool", options=other)
    again = import_pool(tmp_path / "shards", tmp_path / "pool", options=SourceRequest(caption=CHOICE.caption))
    assert (again.new_samples, again.snapshot.rows) == (24, 48)
    with pytest.raises(UserError, match="does nothing"):
        import_pool(tmp_path / "embeddings", tmp_path / "pool", options=CHOICE)


def test_all_readers_find_captions_in_json(tmp_path, shards, run_tailwise):
    from tailwise.export import export
    from tailwise.loader.loader import Loader

    shards(0)
    import_pool(tmp_path / "shards", tmp_path / "pool", options=CHOICE)
    catalog = Catalog.open(tmp_path / "pool")
    expected = Counter(f"text {row}" if row % 3 else f"json {row}" for row in range(24))
    stored = catalog.samples(catalog.parts()[0], ["caption"])["caption"].to_pylist()
    assert Counter(stored) == expected
    plan = make_plan(catalog, "all", PlanRequest(method="random", keep=1.0))
    batch = next(iter(Loader(plan, batch_size=24)))
    assert [stored[row] for row in batch.rows.tolist()] == batch.texts
    assert np.array_equal(np.sort(batch.rows), np.arange(24))
    export(Plan(catalog, "all"), "shards", tmp_path / "out", epoch=0)
    exported = read_shard(str(tmp_path / "out" / "00000000.tar")).samples
    assert Counter(exported["caption"].to_pylist()) == expected and set(exported["image_extension"].to_pylist()) == {
        "png"
    }
    run_tailwise("verify", tmp_path / "pool")
    (tmp_path / "pool" / "members.json").write_text("{}")
    run_tailwise("verify", tmp_path / "pool", code=1)
