"""A small catalog whose captions, keys and images are hostile, with two plans, a dedup, a filter and a grouping; and its report."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import tailwise
from tailwise.requests import (
    ClusterRequest,
    DedupRequest,
    FilterRequest,
    GroupRequest,
    PlanRequest,
    ReportRequest,
)

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>bold</b> {{ 7*7 }} \u2028 ${1}"
SECRET = b"a comment in the file that must not be copied"
GROUPS = (40, 24, 16, 10, 6, 4)


def image(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((50, 60)).save(stream, "JPEG", comment=SECRET)
    return stream.getvalue()


@pytest.fixture(scope="package")
def report_catalog(tmp_path_factory, make_tar, make_embeddings):
    folder = tmp_path_factory.mktemp("report") / "pool <b>"
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(len(GROUPS)), GROUPS)
    members = []
    for row, group in enumerate(groups.tolist()):
        caption = f"{HOSTILE} animal{group} number {row}" if row % 10 == 0 else f"animal{group} walks, photo {row}"
        content = b"not an image" if row == 7 else image(row // 2 if group == 0 else row)
        members += [(f"{row:03d}<i>.jpg", content), (f"{row:03d}<i>.txt", caption.encode())]
    make_tar(folder / "shards" / "0.tar", members)
    axes = np.linalg.qr(random.normal(size=(16, 16)))[0][groups] + random.normal(scale=0.08, size=(len(groups), 16))
    axes[1:12:2] = axes[:12:2]
    make_embeddings(folder / "emb", {f"{row:03d}<i>": axes[row] for row in range(len(groups))})
    path = folder / "catalog <i>"
    tailwise.import_pool([str(folder / "shards"), str(folder / "emb")], path, workers=1)
    catalog = tailwise.Catalog.open(path)
    tailwise.cluster(catalog, ClusterRequest(k=2, name="coarse"))
    tailwise.dedup(catalog, DedupRequest(epsilon=0.01, clustering="coarse"))
    tailwise.filter_samples(catalog, FilterRequest(by="caption-words", minimum=5.0, name="short"))
    tailwise.cluster(catalog, ClusterRequest(k=6))
    entries = folder / "entries.txt"
    entries.write_text("".join(f"animal{group}\n" for group in range(len(GROUPS))))
    tailwise.group(catalog, GroupRequest(entries=entries, name="animals"))
    tailwise.make_plan(catalog, "epochs", PlanRequest(method="dynamics", keep=0.5))
    tailwise.make_plan(catalog, "subset", PlanRequest(method="dbp", keep=0.3))
    return catalog


@pytest.fixture(scope="package")
def study_folder(tmp_path_factory, comparison_summary):
    folder = tmp_path_factory.mktemp("study")
    (folder / "summary.json").write_text(json.dumps(comparison_summary(HOSTILE, "random")))
    return folder


@pytest.fixture(scope="package")
def report_folder(report_catalog, study_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("page") / "report"
    tailwise.make_report(report_catalog, ReportRequest(output=output, samples_per_second=1000.0, study=study_folder))
    return output
