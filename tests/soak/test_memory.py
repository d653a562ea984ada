"""Small files that ask for gigabytes: each costs an error or a rejection, within a gigabyte of memory and a minute."""

import gzip
import io
import pathlib
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

LIMIT_BYTES = 1_000_000_000
SECONDS = 100
BIG = 3_000_000_000


def sparse(path, head=b"", size=BIG):
    """A file that takes no room on the disk, and reads as zeros behind its head."""
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(size)


def tar_of_big_member(folder, name):
    info = tarfile.TarInfo("a.jpg")
    info.size = 3
    big = tarfile.TarInfo(name)
    big.size = BIG
    (folder / "shards").mkdir()
    head = info.tobuf(tarfile.USTAR_FORMAT) + b"abc".ljust(512, b"\0")
    if name != "a.txt":
        text = tarfile.TarInfo("a.txt")
        text.size = 3
        head += text.tobuf(tarfile.USTAR_FORMAT) + b"abc".ljust(512, b"\0")
    sparse(
        folder / "shards" / "0.tar",
        head + big.tobuf(tarfile.USTAR_FORMAT),
        size=len(head) + 512 + BIG // 512 * 512 + 10_240,
    )


def png(width, height):
    """A PNG of one colour: its pixels deflate to almost nothing."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def pax_of_gigabytes(folder):
    (folder / "shards").mkdir()
    info = tarfile.TarInfo("x")
    info.type, info.size = b"x", BIG
    sparse(folder / "shards" / "0.tar", info.tobuf(tarfile.USTAR_FORMAT), size=BIG + 10_240)


def npz_bomb(folder):
    uids = [f"{row:032x}" for row in range(12)]
    pq.write_table(pa.table({"uid": uids, "text": ["a"] * 12}), folder / "m.parquet")
    with (
        zipfile.ZipFile(folder / "m.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("l14_img.npy", "w", force_zip64=True) as out,
    ):
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            stream, {"descr": "<f2", "fortran_order": False, "shape": (12, 100_000_000)}
        )
        out.write(stream.getvalue())
        block = bytes(1 << 24)
        for _ in range(1_300_000_000 // len(block)):
            out.write(block)


def unfolding(path, column, rows=200, **others):
    """Some rows with one text of 100 MB: 20 GB in a file of some kilobytes."""
    text = pa.DictionaryArray.from_arrays(
        pa.array([0] + [1] * (rows - 1), pa.int32()), pa.array(["a", "x" * 100_000_000])
    )
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({column: text, **others}), path, compression="zstd")
    assert path.stat().st_size < 100_000


def long_captions(folder):
    unfolding(folder / "m" / "m.parquet", "text", rows=40, uid=[f"{row:032x}" for row in range(40)])


def many_long_captions(folder):
    """Each is short enough, all together have 100 GB."""
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), pa.array(["x" * 1_000_000]))
    (folder / "m").mkdir()
    uids = [f"{row:032x}" for row in range(100_000)]
    pq.write_table(pa.table({"text": text, "uid": uids}), folder / "m" / "m.parquet", compression="zstd")


def long_keys(folder):
    tar_of_big_member(folder, "b.txt")
    unfolding(folder / "shards" / "0.parquet", "key")


def gzip_bomb(folder):
    (folder / "set" / "test").mkdir(parents=True)
    (folder / "set" / "classnames.txt").write_text("cat\ndog\n")
    (folder / "set" / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    (folder / "set" / "test" / "nshards.txt").write_text("1\n")
    big = tarfile.TarInfo("s0.jpg")
    big.size = BIG
    head, block = gzip.compress(big.tobuf(tarfile.USTAR_FORMAT)), gzip.compress(bytes(1 << 24))
    (folder / "set" / "test" / "0.tar").write_bytes(head + block * (BIG >> 24))  # members of gzip follow each other


def one_row_of_a_million(folder):
    """Embeddings of 1 × 1,000,000 in clip-retrieval's layout: two megabytes that could ask for thirty gigabytes."""
    head = b"".join(
        info.tobuf(tarfile.USTAR_FORMAT) + b"abc".ljust(512, b"\0")
        for info in map(tarfile.TarInfo, ("0.jpg", "0.txt"))
        for info.size in (3,)
    )
    (folder / "shards").mkdir()
    (folder / "shards" / "0.tar").write_bytes(head + bytes(1024))
    for name in ("img_emb", "metadata"):
        (folder / "embeddings" / name).mkdir(parents=True)
    np.save(folder / "embeddings" / "img_emb" / "img_emb_0.npy", np.ones((1, 1_000_000), np.float16))
    pq.write_table(pa.table({"image_path": ["0"]}), folder / "embeddings" / "metadata" / "metadata_0.parquet")


def set_with_template(folder):
    (folder / "set" / "cat").mkdir(parents=True)
    (folder / "set" / "cat" / "a.png").write_bytes(png(8, 8))
    (folder / "set" / "zeroshot_classification_templates.txt").write_text("{c:>1500000000}\n")


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
COMMAND = "from tailwise.cli import main; import sys; sys.argv = ['tailwise', *sys.argv[1:]]; main()"
IMPORT = (COMMAND, "import", "{}/shards", "{}/cat", "--workers", "1")
DECODE = """
import sys
from tailwise.shards.decode import ImageError, decode_rgb
try:
    decode_rgb(open(sys.argv[1], "rb").read())
except ImageError as error:
    print(error)
"""
COUNTS = """
import pathlib, sys
from tailwise.errors import UserError
from tailwise.evaluate.counts import read_train_counts
try:
    read_train_counts(pathlib.Path(sys.argv[1]), ["cat"])
except UserError as error:
    sys.exit(2)
"""
KEYS = """
import pathlib, sys
from tailwise.errors import UserError
from tailwise.steps.upkeep.remove import read_names
try:
    read_names(pathlib.Path(sys.argv[1]))
except UserError as error:
    print(error)
"""
COLUMN = """
import pathlib, sys
from tailwise.errors import UserError
from tailwise.steps.grouping.group import _open
try:
    for keys, values in _open(pathlib.Path(sys.argv[1]), "group"):
        pass
except UserError as error:
    print(error)
"""
SET = """
import sys
from tailwise.errors import UserError
from tailwise.evaluate.sets import find_set
try:
    for shard in find_set(sys.argv[1]).shards:
        for sample in shard.samples():
            print(sample)
except UserError as error:
    print(error)
"""

HOSTILE = {
    "caption of 3 GB": (lambda at: tar_of_big_member(at, "a.txt"), IMPORT),
    "description of 3 GB": (lambda at: tar_of_big_member(at, "a.json"), IMPORT),
    "pax header of 3 GB": (pax_of_gigabytes, IMPORT),
    "npz of 1.3 GB": (npz_bomb, (COMMAND, "import", "{}", "{}/cat", "--workers", "1")),
    "captions that unfold to 4 GB": (long_captions, (COMMAND, "import", "{}/m", "{}/cat", "--workers", "1")),
    "captions that unfold to 100 GB": (many_long_captions, (COMMAND, "import", "{}/m", "{}/cat", "--workers", "1")),
    "sidecar keys that unfold to 20 GB": (long_keys, IMPORT),
    "removed keys that unfold to 20 GB": (lambda at: unfolding(at / "keys.parquet", "key"), (KEYS, "{}/keys.parquet")),
    "groups that unfold to 20 GB": (
        lambda at: unfolding(at / "g.parquet", "group", key=[str(row) for row in range(200)]),
        (COLUMN, "{}/g.parquet"),
    ),
    "picture of 12,000 x 12,000": (lambda at: (at / "a.png").write_bytes(png(12_000, 12_000)), (DECODE, "{}/a.png")),
    "gzipped tar of 3 GB": (
        gzip_bomb,
        (
            SET,
            "{}/set",
        ),
    ),
    "array of 1 x 1,000,000": (
        one_row_of_a_million,
        (COMMAND, "import", "{}/shards", "{}/embeddings", "{}/cat", "--workers", "1"),
    ),
    "template of 1,500,000,000 characters": (set_with_template, (SET, "{}/set")),
    "recipe of aliases": (
        lambda at: (at / "r.yaml").write_text(ALIASES),
        (COMMAND, "run", "{}/r.yaml", "{}/none", "{}/cat"),
    ),
    "recipe of brackets": (
        lambda at: (at / "r.yaml").write_text("a: " + "[" * 100_000),
        (COMMAND, "run", "{}/r.yaml", "{}/none", "{}/cat"),
    ),
    "recipe of 3 GB": (lambda at: sparse(at / "r.yaml", b"a: "), (COMMAND, "run", "{}/r.yaml", "{}/none", "{}/cat")),
    "class counts of 3 GB": (
        lambda at: sparse(at / "c.tsv", b"cat\t"),
        (
            COUNTS,
            "{}/c.tsv",
        ),
    ),
    "rates of brackets": (
        lambda at: (at / "c.json").write_text("[" * 1_000_000),
        (
            COUNTS,
            "{}/c.json",
        ),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_stays_within_a_gigabyte(tmp_path, note, name):
    make, (code, *arguments) = HOSTILE[name]
    make(tmp_path)
    began = time.monotonic()
    command = [sys.executable, "-c", code, *(argument.replace("{}", str(tmp_path)) for argument in arguments)]
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, cwd=tmp_path)
        peak = _watch(process)
        said.seek(0)
        text = said.read()
    seconds = time.monotonic() - began
    note("memory", name, peak_bytes=peak, seconds=seconds)
    assert process.returncode in (0, 1, 2), (process.returncode, text)
    assert "Traceback" not in text, text
    assert peak < LIMIT_BYTES, (peak, text)


def _watch(process):
    """Waits for a process; ends it once it holds too much, or is late. Returns its peak of memory in bytes, without mapped files.

    torch built for CUDA maps libraries of half a gigabyte, which are on the disk. The kernel keeps the peak of all memory (VmHWM), so that
    no peak between two readings is missed. The first reading may still be of this process, which has just forked: it doesn't count.
    """
    until, peak, highest, files, first = time.monotonic() + SECONDS, 0, 0, 0, True
    while process.poll() is None:
        found = _memory(process.pid)
        if found and not first:
            files = max(files, found["RssFile"])
            peak = max(peak, found["RssAnon"] + found["RssShmem"])
            highest = found["VmHWM"]
        first = False
        if time.monotonic() > until or peak > 2 * LIMIT_BYTES:
            process.kill()
        time.sleep(0.01)
    return max(peak, highest - files)


def _memory(pid):
    """Figures of /proc/PID/status in bytes; nothing once the process has ended."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    figures = [line.split() for line in lines if line.startswith(("VmHWM", "Rss"))]
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in figures}
