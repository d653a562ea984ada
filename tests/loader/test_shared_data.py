"""Real photographs from real tars: what an epoch of a plan draws is what comes, and all of it can be decoded."""

from collections import Counter

import numpy as np
import pytest
import torch

from tailwise import Loader, PlanRequest, cluster, import_pool, make_plan
from tailwise.requests import ClusterRequest

pytestmark = pytest.mark.shared_data


def to_pixels(image):
    return torch.from_numpy(np.array(image))


def test_an_epoch_of_real_images(shared_data, tmp_path):
    pool = shared_data / "tinyimagenet-lt"
    catalog = import_pool([str(pool / "train"), str(pool / "embeddings")], tmp_path / "catalog", workers=1).catalog
    cluster(catalog, ClusterRequest(k=20))
    plan = make_plan(catalog, "epochs", PlanRequest("dynamics", keep=0.5))
    keys = np.concatenate([catalog.samples(part, ["key"]).column(0).to_numpy() for part in catalog.parts()])
    loader = Loader(plan, batch_size=256, workers=2, transform=to_pixels)
    found, captions = Counter(), Counter()
    for batch in loader.epoch(0):
        assert batch.replaced == []
        assert batch.images.shape == (256, 64, 64, 3)
        assert batch.images.float().std(dim=(1, 2, 3)).min() > 0
        found.update(batch.rows.tolist())
        captions.update(batch.texts)
    state = loader.state_dict()
    loader.close()
    alone = Loader(plan, batch_size=256)
    alone.load_state_dict(state)
    fulls = found.total()
    for batch in alone.epoch(1):  # what filled no batch
        found.update(batch.rows[batch.epochs == 0].tolist())
    assert 0 < found.total() - fulls < 256
    assert Counter(keys[list(found.elements())]) == Counter(np.repeat(keys, plan.draw(0)).tolist())
    assert len(captions) > 200
