"""The gain of freezing: the learnt architecture as plain convolutions against the network that was trained.

    python -m benchmarks.bench_freeze [FILE.md]

The networks have the paper's widths (16, 32, 64; three blocks); groupings are drawn with p(shared) = 0.6, and the image
is one 160x160 slice. One ratio is the time of the network in `eval()`, on the fastest backend, over that of the frozen
network. The other is the time of the frozen network in onnxruntime, if it is installed, over that in torch.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine, ratio
from sfg_fast import SFGHighResNet, assign, freeze, recalibrate
from sfg_fast.gpu.timing import interleaved
from sfg_fast.networks.controls import sfg_layers

ROUNDS = 15


def weights(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def session(frozen: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any] | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "net.onnx"
        torch.onnx.export(frozen, (x,), str(path), dynamo=True, input_names=["x"], external_data=False, verbose=False)
        run = onnxruntime.InferenceSession(str(path), options)
    return lambda: run.run(None, {"x": x.numpy()})


def row(residual: str, tasks: list[str] | None) -> str:
    torch.manual_seed(0)
    network = SFGHighResNet(1, {"ct": 1, "organs": 6}, 16, 3, residual)
    p = torch.tensor([0.6, 0.2, 0.2])
    assign(network, {n: torch.multinomial(p, m.out_channels, True) for n, m in sfg_layers(network).items()})
    recalibrate(network, [torch.randn(2, 1, 64, 64)])
    frozen, x = freeze(network.eval(), tasks=tasks), torch.randn(1, 1, 160, 160)

    def run(model: torch.nn.Module) -> Callable[[], Any]:
        @torch.no_grad()
        def once() -> Any:
            return model(x)

        return once

    runs = {"network": run(network), "frozen": run(frozen)}
    if (onnx := session(frozen, x)) is not None:
        runs["onnx"] = onnx
    times = interleaved(runs, ROUNDS)
    cells = ["{:.2f} ({:.2f}-{:.2f})".format(*ratio(times, "network", "frozen"))]
    cells.append("{:.2f} ({:.2f}-{:.2f})".format(*ratio(times, "onnx", "frozen")) if "onnx" in times else "-")
    size = f"{weights(network)} | {weights(frozen)}"
    return f"| {residual} | {', '.join(tasks or ['all'])} | {size} | " + " | ".join(cells) + " |"


def main() -> None:
    rows = [row(residual, tasks) for residual in ("routed", "separate") for tasks in (None, ["ct"])]
    text = (
        f"# Frozen networks\n\n`python -m benchmarks.bench_freeze`. {machine()}. Medians (quartiles) of {ROUNDS} "
        "interleaved rounds.\n\n| blocks | tasks | weights in training | frozen | time of the network / frozen "
        "| onnxruntime / frozen in torch |\n|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)


if __name__ == "__main__":
    main()
