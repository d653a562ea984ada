"""Zero-shot classification and retrieval with a model: from images to guesses and recalls.

Letters: n images, m texts, C classes, K values of k.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (as everyone has it)

from tailwise.encoders.open_clip import LoadedModel
from tailwise.errors import UserError
from tailwise.evaluate.images import Batch, read_batches
from tailwise.evaluate.metrics import TOP
from tailwise.evaluate.sets import ImageSet, fill
from tailwise.progress import Track
from tailwise.shards.decode import ImageError
from tailwise.sources.delimited import read_text

KS = (1, 5, 10)
_ROWS = 1024  # of a matrix of scores that is held at once


@dataclass(frozen=True)
class Guesses:
    """What a model took the images of a set for.

    Attributes:
        labels: int64 [n], their classes.
        guesses: int64 [n, TOP or C if that is less], best first.
        skipped: how many samples were left out, by reason.
    """

    labels: npt.NDArray[np.int64]
    guesses: npt.NDArray[np.int64]
    skipped: dict[str, int]


@dataclass(frozen=True)
class Recalls:
    """What a model found in a retrieval set; see `metrics.recall`.

    Attributes:
        texts: int64 [n], how many texts each image has.
        found_texts: bool [n, K].
        found_images: int64 [n, K].
        skipped: how many samples were left out, by reason.
    """

    texts: npt.NDArray[np.int64]
    found_texts: npt.NDArray[np.bool_]
    found_images: npt.NDArray[np.int64]
    skipped: dict[str, int]


def classify(loaded: LoadedModel, images: ImageSet, *, batch_size: int, workers: int | None, track: Track) -> Guesses:
    """Guesses the classes of a set's images, as clip_benchmark does.

    Raises:
        UserError: a shard can't be read, holds a class that isn't there, or the set no image; or the model gives no numbers.
    """
    classifier = build_classifier(loaded, images)
    found: dict[tuple[int, int], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
    skipped: Counter[str] = Counter()
    for batch in _batches(loaded, images, _label, skipped, batch_size=batch_size, workers=workers, track=track):
        labels = np.array(batch.targets, np.int64)
        _check_labels(labels, images)
        with loaded.computing():
            scores = 100.0 * _embed_images(loaded, batch) @ classifier
        found[batch.shard, batch.number] = labels, _top(scores, images.name)
    if not found:
        raise UserError(f"{images.name} holds no image that can be read{_told(skipped)}: check what `data` names")
    labels, guesses = (np.concatenate(column) for column in zip(*(found[key] for key in sorted(found)), strict=True))
    return Guesses(labels, guesses, dict(sorted(skipped.items())))


def build_classifier(loaded: LoadedModel, images: ImageSet) -> Tensor:
    """The embeddings of a set's classes: the mean over its templates, of unit norm; float [d, C].

    One class at a time, as clip_benchmark does, so that its rounding is the same.
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


def retrieve(loaded: LoadedModel, images: ImageSet, *, batch_size: int, workers: int | None, track: Track) -> Recalls:
    """Looks for the texts of each image and the image of each text, in the whole set, as clip_benchmark does.

    The embeddings are kept in memory, and scores of some rows at a time.

    Raises:
        UserError: a shard can't be read, or the set holds no image with texts; or the model gives no numbers.
    """
    found: dict[tuple[int, int], tuple[Tensor, Tensor, list[int]]] = {}
    skipped: Counter[str] = Counter()
    for batch in _batches(loaded, images, _texts, skipped, batch_size=batch_size, workers=workers, track=track):
        with loaded.computing():
            texts = loaded.tokenizer([text for texts in batch.targets for text in texts]).to(loaded.device)
            of_texts = F.normalize(loaded.model.encode_text(texts), dim=-1)
            of_images = _embed_images(loaded, batch)
        found[batch.shard, batch.number] = (
            of_images.float().cpu(),
            of_texts.float().cpu(),
            [len(t) for t in batch.targets],
        )
    if not found:
        raise UserError(f"{images.name} holds no image with texts{_told(skipped)}: check what `data` names")
    ordered = [found[key] for key in sorted(found)]
    of_images, of_texts = torch.cat([item[0] for item in ordered]), torch.cat([item[1] for item in ordered])
    counts = np.array([count for item in ordered for count in item[2]], np.int64)
    _check_numbers(of_images, images.name)
    _check_numbers(of_texts, images.name)
    return Recalls(counts, *_recalls(of_images, of_texts, counts), dict(sorted(skipped.items())))


def _recalls(
    images: Tensor, texts: Tensor, counts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Which are found: bool [n, K], and int64 [n, K]."""
    owners = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    to_text = torch.cat(
        [(owners[near] == row[:, None]).cumsum(1)[:, _last(near)] > 0 for row, near in _nearest(images, texts)]
    )
    to_image = torch.cat(
        [(near == owners[row][:, None]).cumsum(1)[:, _last(near)] > 0 for row, near in _nearest(texts, images)]
    )
    sums = torch.zeros(len(counts), len(KS), dtype=torch.int64).index_add_(0, owners, to_image.long())
    return to_text.numpy(), sums.numpy()


def _nearest(queries: Tensor, gallery: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some queries, and the entries of the gallery that are nearest to each, best first."""
    for first in range(0, len(queries), _ROWS):
        scores = queries[first : first + _ROWS] @ gallery.T
        yield torch.arange(first, first + len(scores)), scores.topk(min(max(KS), len(gallery)), dim=1).indices


def _last(near: Tensor) -> list[int]:
    """The place of the k-th nearest, for each k; a smaller gallery is found whole."""
    return [min(k, near.shape[1]) - 1 for k in KS]


def _batches(
    loaded: LoadedModel,
    images: ImageSet,
    parse: Callable[[bytes], Any],
    skipped: Counter[str],
    *,
    batch_size: int,
    workers: int | None,
    track: Track,
) -> Iterator[Batch]:
    """The batches that hold anything; what is left out is counted."""
    for batch in read_batches(
        images.shards,
        loaded.preprocess,
        parse,
        batch_size=batch_size,
        workers=workers,
        track=track,
        description=images.name,
    ):
        skipped.update(batch.skipped)
        if batch.targets:
            yield batch


def _embed_images(loaded: LoadedModel, batch: Batch) -> Tensor:
    return F.normalize(loaded.model.encode_image(batch.images.to(loaded.device)), dim=-1)


def _top(scores: Tensor, name: str) -> npt.NDArray[np.int64]:
    scores = scores.float().cpu()
    _check_numbers(scores, name)
    top: npt.NDArray[np.int64] = scores.topk(min(TOP, scores.shape[1]), dim=1).indices.numpy()
    return top


def _check_numbers(values: Tensor, name: str) -> None:
    if not torch.isfinite(values).all():
        raise UserError(
            f"the model gives no finite numbers on {name}: its training diverged, or `precision` is too low"
        )


def _check_labels(labels: npt.NDArray[np.int64], images: ImageSet) -> None:
    wrong = labels[(labels < 0) | (labels >= len(images.classes))]
    if len(wrong):
        raise UserError(
            f"{images.name} holds an image of class {wrong[0]}, but {len(images.classes):,} class names (0 … {len(images.classes) - 1}): "
            "give `classes` with a name for each"
        )


def _label(content: bytes) -> int:
    try:
        return int(read_text(content))
    except ValueError as error:
        raise UserError(f"a .cls holds {content[:20]!r}: must be the index of a class, such as 17") from error


def _texts(content: bytes) -> list[str] | None:
    try:
        return read_text(content).splitlines() or None  # as clip_benchmark
    except ValueError as error:
        raise ImageError("caption is not text", str(error)) from error


def _told(skipped: Counter[str]) -> str:
    return f" ({', '.join(f'{count:,} {reason}' for reason, count in sorted(skipped.items()))})" if skipped else ""
