"""Zero-shot classification and retrieval with a model: from images to guesses and recalls.

Letters: n images, m texts, C classes, K values of k.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (torch's convention)

from tailwise.catalog.files import read_header
from tailwise.context import Context
from tailwise.encoders.open_clip import LoadedModel
from tailwise.errors import UserError
from tailwise.evaluate.images import Batch, read_batches
from tailwise.evaluate.metrics import TOP, Ints
from tailwise.evaluate.sets import ImageSet, fill
from tailwise.requests import EvaluateRequest
from tailwise.shards.decode import ImageError
from tailwise.storage.delimited import read_text

T = TypeVar("T")
MAX_GROUPS = 1 << 20  # of images by region or income
KS = (1, 5, 10)
_ROWS = 1024  # rows of scores at a time


def classify(
    loaded: LoadedModel, images: ImageSet, options: EvaluateRequest, context: Context
) -> tuple[Ints, Ints, Ints, dict[str, int]]:
    """Guess the classes of a set's images, as clip_benchmark does, or raise a UserError for unreadable shards and unknown classes.

    Return the true classes [n], the guesses [n, TOP or C if that is less], best first, the groups [n] (0 where the set has none, −1 for the
    group that it ignores), and the samples left out, by reason.
    """
    classifier = build_classifier(loaded, images)

    def guess(batch: Batch) -> tuple[Ints, Ints, Ints]:
        labels, groups = np.array(batch.targets, np.int64).T
        groups[groups == images.ignored_group] = -1
        if len(wrong := labels[(labels < 0) | (labels >= len(images.classes))]):
            known = f"{len(images.classes):,} class names (0 … {len(images.classes) - 1})"
            problem = f"holds an image of class {wrong[0]}, but {known}"
            raise UserError(f"{images.name} {problem}: give `classes` with a name for each")
        with loaded.computing():
            scores = (100.0 * _embed_images(loaded, batch) @ classifier).float().cpu()
        _check_numbers(scores, images.name)
        return labels, scores.topk(min(TOP, scores.shape[1]), dim=1).indices.numpy(), groups

    found, skipped = _over_batches(guess, loaded, images, _label, "that can be read", options, context)
    labels, guesses, groups = (np.concatenate(column) for column in zip(*found, strict=True))
    return labels, guesses, groups, skipped


def build_classifier(loaded: LoadedModel, images: ImageSet) -> Tensor:
    """Return the embeddings of a set's classes, means over its templates, of unit norm: float [d, C].

    It takes one class at a time, as clip_benchmark does, for the same rounding.
    """
    import open_clip  # noqa: PLC0415  (an extra)

    own = [lambda name, template=template: fill(template, name) for template in images.templates]
    with loaded.computing():
        classifier: Tensor = open_clip.build_zero_shot_classifier(
            loaded.model,
            loaded.tokenizer,
            images.classes,
            own or open_clip.OPENAI_IMAGENET_TEMPLATES,
            num_classes_per_batch=1,
            device=loaded.device,
        )
    return classifier


def retrieve(
    loaded: LoadedModel, images: ImageSet, options: EvaluateRequest, context: Context
) -> tuple[npt.NDArray[np.bool_], Ints, Ints, dict[str, int]]:
    """Search the whole set for the texts of each image and the image of each text, as clip_benchmark does.

    Return what `metrics.recall` takes: found texts [n, K], found images [n, K], texts [n]; and the samples left out, by reason. All
    embeddings are in memory, and the scores of some rows at a time. Raise a UserError if a shard cannot be read, the set has no image with
    texts, or the model gives no finite numbers.
    """

    def embed(batch: Batch) -> tuple[Tensor, Tensor, list[int]]:
        with loaded.computing():
            texts = loaded.tokenizer([text for texts in batch.targets for text in texts]).to(loaded.device)
            of_texts = F.normalize(loaded.model.encode_text(texts), dim=-1)
            of_images = _embed_images(loaded, batch)
        return of_images.float().cpu(), of_texts.float().cpu(), [len(texts) for texts in batch.targets]

    found, skipped = _over_batches(embed, loaded, images, _texts, "with texts", options, context)
    of_images, of_texts = torch.cat([item[0] for item in found]), torch.cat([item[1] for item in found])
    lengths = np.array([count for item in found for count in item[2]], np.int64)
    _check_numbers(of_images, images.name)
    _check_numbers(of_texts, images.name)
    owners = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    to_text = [_within(owners[near] == row[:, None]) for row, near in _nearest(of_images, of_texts)]
    to_image = [_within(near == owners[row][:, None]) for row, near in _nearest(of_texts, of_images)]
    sums = torch.zeros(len(lengths), len(KS), dtype=torch.int64).index_add_(0, owners, torch.cat(to_image).long())
    return torch.cat(to_text).numpy(), sums.numpy(), lengths, skipped


def _nearest(queries: Tensor, gallery: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some queries, and the nearest entries of the gallery to each, best first."""
    for first in range(0, len(queries), _ROWS):
        scores = queries[first : first + _ROWS] @ gallery.T
        yield torch.arange(first, first + len(scores)), scores.topk(min(max(KS), len(gallery)), dim=1).indices


def _within(right: Tensor) -> Tensor:
    """Return whether one of the k nearest is right, for each k; k is at most the size of the gallery: bool [n, K]."""
    return right.cumsum(1)[:, [min(k, right.shape[1]) - 1 for k in KS]] > 0


def _over_batches(
    compute: Callable[[Batch], T],
    loaded: LoadedModel,
    images: ImageSet,
    parse: Callable[[tuple[bytes, ...]], Any],
    kind: str,  # of images that the set must have, for the error
    options: EvaluateRequest,
    context: Context,
) -> tuple[list[T], dict[str, int]]:
    """Return what is computed of each batch that has a sample, in the order of the set, and the samples left out, by reason."""
    found: dict[tuple[int, int], T] = {}
    skipped: Counter[str] = Counter()
    how: dict[str, Any] = {"batch_size": options.batch_size, "workers": options.workers, "description": images.name}
    for batch in read_batches(images.shards, loaded.preprocess, parse, context=context, **how):
        skipped.update(batch.skipped)
        if batch.targets:
            found[batch.shard, batch.number] = compute(batch)
    if not found:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
        why = f" ({counts})" if counts else ""
        raise UserError(f"{images.name} holds no image {kind}{why}: check what `data` names")
    return [found[key] for key in sorted(found)], dict(sorted(skipped.items()))


def _embed_images(loaded: LoadedModel, batch: Batch) -> Tensor:
    return F.normalize(loaded.model.encode_image(batch.images.to(loaded.device)), dim=-1)


def _check_numbers(values: Tensor, name: str) -> None:
    if not torch.isfinite(values).all():
        cause = "its training diverged, or `precision` is too low"
        raise UserError(f"the model gives no finite numbers on {name}: {cause}")


def _label(targets: tuple[bytes, ...]) -> tuple[int, int]:
    """Return the class, and the group that the first number of a second target, a .npy, names: DataComp's sets by region or income."""
    content, *more = targets
    try:
        label = int(read_text(content))
    except ValueError as error:
        raise UserError(f"a .cls holds {content[:20]!r}: must be the index of a class, such as 17") from error
    try:
        return label, _group(more[0]) if more else 0
    except (ValueError, IndexError) as error:
        raise UserError(f"a .npy holds no group ({error}): must be whole numbers, the first is the group") from error


def _group(content: bytes) -> int:
    header = read_header(stream := BytesIO(content), len(content))
    if header.dtype.kind not in "iuf":
        raise ValueError(f"it holds {header.dtype}")
    group = np.frombuffer(stream.read(), header.dtype)[0]
    if not 0 <= group < MAX_GROUPS or group != int(group):
        raise ValueError(f"its first number is {group}")
    return int(group)


def _texts(targets: tuple[bytes, ...]) -> list[str] | None:
    try:
        return read_text(targets[0]).splitlines() or None  # as clip_benchmark
    except ValueError as error:
        raise ImageError("caption is not text", str(error)) from error
