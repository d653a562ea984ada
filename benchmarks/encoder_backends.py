"""Ways to run an image encoder on a CPU: images a second, and how far their rows are from those of torch in fp32.

Networks: `lite0` (EfficientNet-Lite0 at 128 pixels, ImageNet weights) and the image tower of open_clip's ViT-B-32 (224 pixels, random
weights), on one preloaded batch of the images of `--data`, or of noise. Ways take turns; the best of `--rounds` counts, since other
processes can only slow a turn down. *CPU*: processor milliseconds of an image. *Set-up*: seconds from the loaded network to the end of the
first batch. *Difference*: the greatest of any component of unit rows. *Cosine*: the least.
Ways whose package is missing are left out; all of them: pip install openvino onnxruntime onnx onnxscript.
usage: encoder_backends.py [--data FOLDER_OF_TARS] [--batch-size 64] [--rounds 7] [--network lite0 …] [--way eager …]
"""

import argparse
import copy
import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import open_clip
import pools
import torch
from common import print_header
from torch import Tensor, nn

from tailwise.encoders.lite0 import load_network, make_squares
from tailwise.encoders.lite0 import run as run_lite0
from tailwise.shards.decode import decode_rgb

Run = Callable[[Tensor], Tensor]


@dataclass
class Turn:
    """One way, set up.

    Attributes:
        run: a batch to rows.
        setup: seconds.
        seconds, processor: of each turn.
    """

    run: Run
    setup: float
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


class Lite0(nn.Module):
    """`lite0` as a module of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.network = load_network().to(memory_format=torch.contiguous_format)
        self.network.reset_classifier(0)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return rows of uint8 [n, s, s, 3]."""
        return run_lite0(self.network, {"image": pixels})


def lite0(contents: list[bytes]) -> tuple[nn.Module, Tensor]:
    return Lite0().eval(), make_squares(128, [decode_rgb(content) for content in contents])["image"]


def vit(contents: list[bytes]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("ViT-B-32")
    return model.visual.eval(), torch.stack([transform(decode_rgb(content)) for content in contents])


def eager(network: nn.Module, _: Tensor) -> Run:
    return network


def channels_last(network: nn.Module, _: Tensor) -> Run:
    return network.to(memory_format=torch.channels_last)


def bf16(network: nn.Module, _: Tensor) -> Run:
    def run(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(batch).float()

    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
            module.to(torch.bfloat16)
    return run


def bf16_channels_last(network: nn.Module, batch: Tensor) -> Run:
    return bf16(network.to(memory_format=torch.channels_last), batch)


def compiled(network: nn.Module, _: Tensor) -> Run:
    return torch.compile(network.to(memory_format=torch.channels_last))


def compiled_bf16(network: nn.Module, batch: Tensor) -> Run:
    return torch.compile(bf16_channels_last(network, batch))


def onnxruntime(network: nn.Module, batch: Tensor) -> Run:
    import io

    import onnxruntime as ort

    stream = io.BytesIO()
    torch.backends.mha.set_fastpath_enabled(False)  # which ONNX doesn't have
    torch.onnx.export(network, (batch[:1],), stream, dynamo=False, dynamic_axes={"x": {0: "n"}}, input_names=["x"])
    torch.backends.mha.set_fastpath_enabled(True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(stream.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"x": batch.numpy()})[0])


def openvino(network: nn.Module, batch: Tensor, precision: str = "f32") -> Run:
    sys.modules.setdefault("openvino_telemetry", None)  # it would tell OpenVINO's maker
    import openvino as ov

    shape = [-1, *batch.shape[1:]]
    traced = torch.jit.trace(network, batch[:2], check_trace=False)
    graph = ov.convert_model(traced, example_input=batch[:2], input=shape)
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    run = ov.Core().compile_model(graph, "CPU", settings)
    return lambda batch: torch.from_numpy(run(batch.numpy())[0])


def openvino_bf16(network: nn.Module, batch: Tensor) -> Run:
    return openvino(network, batch, "bf16")


NETWORKS = {"lite0": lite0, "ViT-B-32": vit}
WAYS: dict[str, tuple[Callable[[nn.Module, Tensor], Run], str]] = {
    "eager": (eager, "torch"),
    "channels_last": (channels_last, "torch"),
    "bf16": (bf16, "torch"),
    "bf16, channels_last": (bf16_channels_last, "torch"),
    "torch.compile": (compiled, "torch"),
    "torch.compile, bf16": (compiled_bf16, "torch"),
    "onnxruntime": (onnxruntime, "onnxruntime"),
    "openvino": (openvino, "openvino"),
    "openvino, bf16": (openvino_bf16, "openvino"),
}


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--network", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--way", nargs="*", default=list(WAYS), choices=list(WAYS))
    arguments = parser.parse_args()
    installed = [package for package in dict.fromkeys(package for _, package in WAYS.values()) if find(package)]
    print_header(f"encoders, batches of {arguments.batch_size}, {torch.get_num_threads()} threads", "timm", *installed)
    contents = list(islice(cycle(read(arguments.data)), arguments.batch_size))
    for name in arguments.network:
        measure(name, contents, [way for way in arguments.way if WAYS[way][1] in installed], arguments.rounds)


def find(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def read(tars: Path | None) -> list[bytes]:
    if tars is not None:
        return [image for _, image, _ in islice(pools.read_samples(tars), 256)]
    import io

    from PIL import Image

    random, contents = np.random.default_rng(0), []
    for _ in range(64):
        stream = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64)).save(stream, "PNG")
        contents.append(stream.getvalue())
    return contents


def measure(name: str, contents: list[bytes], ways: list[str], rounds: int) -> None:
    network, batch = NETWORKS[name](contents)
    print(f"\n{name}, {tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')}", flush=True)
    with torch.inference_mode():
        expected = unit(network(batch))
    turns, rows = {}, {}
    for way in ways:
        start = time.perf_counter()
        try:
            with torch.no_grad():
                run = WAYS[way][0](copy.deepcopy(network), batch)
                rows[way] = unit(run(batch))
        except Exception as error:  # noqa: BLE001  (of any library)
            print(f"  {way:<20} failed: {' '.join(str(error).split())[:160]}")
            continue
        turns[way] = Turn(run, time.perf_counter() - start)
    for _ in range(rounds):
        for turn in turns.values():
            start, processor = time.perf_counter(), time.process_time()
            with torch.no_grad():
                turn.run(batch)
            turn.seconds.append(time.perf_counter() - start)
            turn.processor.append(time.process_time() - processor)
    print(f"  {'':<20} images/s   × eager   CPU ms   set-up s   difference   cosine")
    first = min(next(iter(turns.values())).seconds)
    for way, turn in turns.items():
        best = min(turn.seconds)
        difference = float((rows[way] - expected).abs().max())
        cosine = float((rows[way] * expected).sum(dim=1).min())
        print(
            f"  {way:<20} {len(batch) / best:8.1f} {first / best:9.2f} {min(turn.processor) / len(batch) * 1e3:8.2f} "
            f"{turn.setup:10.1f}   {difference:10.1e}   {cosine:.6f}"
        )


def unit(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows.double(), dim=1)


if __name__ == "__main__":
    main()
