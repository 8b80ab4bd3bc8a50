"""What the model of roofline.py says of every pass of a layer, beside what an H200 measured. It needs no GPU.

    python benchmarks/gpu_model.py [--markdown FILE] [--json FILE] [--beside FILE] [--dtype bf16] [--channels N ..]

Times called predicted come from the model, times called measured from results/gpu/h200_confirmed.jsonl. A measured time
stands beside the prediction only if the launch is still the one that was measured (h200_confirmed_launches.json).
`--beside` takes what `--json` wrote under another version of Triton, and tells what that one compiled otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    import os

    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton

from benchmarks import counted, variants
from benchmarks.counted import EACH_IMAGE, Architecture, Configuration
from benchmarks.gpu_tables import table
from benchmarks.roofline import DEMANDS, H100, H200, LAUNCH, LIMITS, Demand, Gpu, Prediction, convolution, estimate
from benchmarks.static_report import ARCHITECTURES, Binary, binary, warnings

HOPPER = ARCHITECTURES[1]
IMAGE, SMALL_IMAGE = (16, 256, 256), (10, 128, 128)
RESULTS = Path(__file__).with_name("results") / "gpu"
# Pass -> its launches, by their names in counted.py.
PASSES = {
    "forward + ReLU": ("forward",),
    "input gradient": ("input gradient",),
    "weight gradient": ("weight gradient", "reduce"),
    "forward, kept": ("forward, undrawn",),
    "input gradient, undrawn": ("input gradient, undrawn",),
    "gates' gradient": ("gates' gradient, undrawn",),
    "norm + ReLU": ("moments", "statistics", "affine"),
    "norm + ReLU, gradient": ("gradient_sums", "slopes", "affine_gradient"),
    "instance norm + leaky ReLU": tuple(part + EACH_IMAGE for part in ("moments", "statistics", "affine")),
    "instance norm + leaky ReLU, gradient": tuple(
        part + EACH_IMAGE for part in ("gradient_sums", "slopes", "affine_gradient")
    ),
    "gates' gradient of each image": ("gates' gradient of each image, undrawn",),
    "pack": ("pack",),
}
STEPS = {  # of one layer without norm
    "`straight_through`": ("forward, kept", "input gradient, undrawn", "gates' gradient", "weight gradient"),
    "`selected`": ("forward + ReLU", "input gradient", "weight gradient"),
}
PLAIN = ("forward + ReLU", "input gradient", "weight gradient")
# A time of cuDNN on an H100 (channels_last, 3x3, bf16), as a review quoted it without its source: seconds, channels and
# image.
PUBLISHED = 31e-6, 64, (32, 56, 56)


class Launch(NamedTuple):
    """One launch of a pass: what was chosen, what the compilers made of it and what it needs."""

    one: Configuration
    made: Binary
    demand: Demand


class Pass(NamedTuple):
    """The launches of a pass of a layer, one after the other."""

    launches: list[Launch]

    def on(self, gpu: Gpu) -> list[Prediction]:
        """What the model says of each launch."""
        return [estimate(launch.made, launch.demand, gpu) for launch in self.launches]

    @property
    def chosen(self) -> str:
        """Which launches, and how long their code is: what a measured time belongs to."""
        return "; ".join(f"{launch.one.chosen}, {len(launch.made.code)} instructions" for launch in self.launches)


def seconds(predictions: list[Prediction]) -> float:
    return sum(one.seconds for one in predictions)


def floor(predictions: list[Prediction]) -> float:
    """Seconds: of each launch the necessary bytes through DRAM, or the necessary products."""
    return sum(one.floor for one in predictions)


def layer_launches(
    k: int, dtype: str, architecture: Architecture, image: tuple[int, int, int]
) -> dict[str, Configuration]:
    """Every launch of a layer k -> k and of the normalisation behind it, without a shortcut."""
    found = {one.direction: one for one in counted.layer_configurations(k, k, dtype, architecture, image)}
    for direction, constants in counted.norm_constants(k, architecture, image, shortcut=False).items():
        kernel = direction.removesuffix(EACH_IMAGE)
        found[direction] = found["pack"]._replace(direction=direction, kernel=kernel, constants=constants)
    return found


def layer_passes(
    k: int, dtype: str = "bf16", image: tuple[int, int, int] = IMAGE, names: tuple[str, ...] = tuple(PASSES)
) -> dict[str, Pass]:
    """The passes of a layer k -> k, compiled."""
    some = layer_launches(k, dtype, HOPPER, image)
    return {
        name: Pass(
            [
                Launch(some[part], binary(some[part]), DEMANDS.get(some[part].kernel, convolution)(some[part]))
                for part in PASSES[name]
            ]
        )
        for name in names
    }


# --- what was measured ------------------------------------------------------------------------------------------------


def measured() -> Iterator[tuple[int, str, str, dict[str, float]]]:
    """Width, variant, pass and the medians in seconds of ours and of others, of every pass that the H200 measured."""
    for line in (RESULTS / "h200_confirmed.jsonl").read_text().splitlines():
        entry = json.loads(line)
        name, value = entry.get("name", ""), entry.get("value")
        if name.startswith("layer "):
            for one, row in value["passes"].items():
                times = {who: us[1] / 1e6 for who, us in row.items() if isinstance(us, list)}
                yield int(name.split()[1]), "as chosen", renamed(one), times
        elif name.startswith("variants of "):
            for variant, row in value.items():
                if variant != "as chosen" and isinstance(row, dict):
                    for one, us in row.items():
                        yield int(name.split()[-2]), variant, renamed(one), {"ours": us[1] / 1e6}


def renamed(name: str) -> str:
    """What these results call "others" is called undrawn rows now."""
    return name.replace("others", "undrawn")


def varied_passes(k: int, variant: str, names: tuple[str, ...]) -> dict[str, Pass]:
    """The passes of a layer under a variant of variants.py."""
    with variants.forced((variants.CONVOLUTIONS[k] | variants.GRADIENTS[k])[variant]):
        return layer_passes(k, names=names)


def still_chosen(chosen: str, recorded: str, version: str) -> bool:
    """Is this the launch that was measured? Lengths of code are compared only if the same Triton compiled both."""

    def launches(text: str) -> list[str]:
        return [part.rpartition(", ")[0] for part in text.split("; ")]

    return chosen == recorded if version == triton.__version__ else launches(chosen) == launches(recorded)


class Fit(NamedTuple):
    """One measured pass: its width, variant and name, and seconds."""

    width: int
    variant: str
    name: str
    measured: float
    predicted: float


def fits(passes: dict[int, dict[str, Pass]]) -> list[Fit]:
    """All measured passes and variants of these layers whose launches are still what was measured."""
    recorded = json.loads((RESULTS / "h200_confirmed_launches.json").read_text())
    by_variant: dict[tuple[int, str], dict[str, float]] = {}
    for k, variant, name, times in measured():
        if k in passes and (variant == "as chosen" or variant in variants.CONVOLUTIONS[k] | variants.GRADIENTS[k]):
            by_variant.setdefault((k, variant), {})[name] = times["ours"]
    found = []
    for (k, variant), times in by_variant.items():
        here = passes[k] if variant == "as chosen" else varied_passes(k, variant, tuple(times))
        for name, time in times.items():
            as_usual = variant != "as chosen" and here[name].chosen == passes[k][name].chosen
            if not as_usual and still_chosen(
                here[name].chosen, recorded[f"{k}, {variant}, {name}"], recorded["triton"]
            ):
                found.append(Fit(k, variant, name, time, seconds(here[name].on(H200))))
    return found


# --- the report -------------------------------------------------------------------------------------------------------


def us(time: float | None) -> float | None:
    return None if time is None else time * 1e6


def spread(some: list[Fit]) -> str:
    ratios = [one.measured / one.predicted for one in some]
    if len(ratios) < 2:
        return f"{len(ratios)} measured"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return (
        f"measured / predicted has the median {middle:.2f}, the quartiles {low:.2f} and {high:.2f}, "
        f"and lies between {min(ratios):.2f} and {max(ratios):.2f} ({len(ratios)} times)"
    )


def fit_of(compared: list[Fit]) -> list[str]:
    """Lines on how well the model fits what was measured."""
    chosen = [one for one in compared if one.variant == "as chosen"]
    return [
        f"- Passes as chosen: {spread(chosen)}.",
        f"- Variants of these choices: {spread([one for one in compared if one not in chosen])}.",
        f"- {ordered(compared)}",
    ]


def ordered(compared: list[Fit]) -> str:
    """How often the model knows which of two choices for a pass is faster, where a tenth or more was measured."""
    right = wrong = same = 0
    for one, two in itertools.combinations(compared, 2):
        measured, predicted = one.measured / two.measured, one.predicted / two.predicted
        if (one.width, one.name) == (two.width, two.name) and max(measured, 1 / measured) > 1.1:
            if max(predicted, 1 / predicted) < 1.03:
                same += 1
            elif (measured > 1) == (predicted > 1):
                right += 1
            else:
                wrong += 1
    return (
        f"Of {right + wrong + same} pairs of choices for a pass that differ by a tenth, the model orders {right} "
        f"rightly and {wrong} wrongly, and sees no difference (less than .03) in {same}."
    )


def time_table(passes: dict[int, dict[str, Pass]], known: dict[tuple[int, str], float]) -> list[str]:
    """Microseconds on the H200 by each limit, and what was measured."""
    rows: list[list[Any]] = []
    for k, layer in passes.items():
        for name, one in layer.items():
            some = one.on(H200)
            longest = max(some, key=lambda part: part.seconds)
            limits = [us(sum(part.times[limit] for part in some)) for limit in LIMITS if limit != "launch"]
            bound = longest.bound + (f" of {launch_of(one, some)}" if len(some) > 1 else "")
            time, lowest = known.get((k, name)), floor(some)
            predicted = seconds(some)
            rows.append([k, name, *limits, bound, us(predicted), us(lowest), lowest / predicted, us(time),
                         time and time / predicted])  # fmt: skip
    head = ["C = K", "pass", *(limit for limit in LIMITS if limit != "launch"), "bound by", "predicted", "floor"]
    return table([*head, "floor / predicted", "measured", "measured / predicted"], rows)


def launch_of(one: Pass, some: list[Prediction]) -> str:
    """The kernel of a pass that takes longest."""
    return max(zip(some, one.launches, strict=True), key=lambda pair: pair[0].seconds)[1].one.kernel


def count_table(passes: dict[int, dict[str, Pass]]) -> list[str]:
    """What each launch asks for, where it has more to do than to start."""
    rows: list[list[Any]] = []
    for k, layer in passes.items():
        for name, one in layer.items():
            for launch, part in zip(one.launches, one.on(H200), strict=True):
                if part.seconds < 2 * LAUNCH:
                    continue
                pixels = launch.one.pixels
                moved = [part.memory_bytes / pixels, part.cache_bytes / pixels, part.shared_bytes / pixels]
                issued = [part.instructions / pixels, part.matrix, part.matrix_instructions / pixels]
                rest = [f"{part.turns:.0f}", part.registers, part.fits]
                rows.append([k, name, launch.one.kernel, *moved, f"{part.cached:.0%}", *issued, *rest])
    head = ["C = K", "pass", "launch", "DRAM", "L2", "shared path", "may hit L1", "instructions", "matrix"]
    return table([*head, "matrix instructions", "turns", "registers", "CTAs"], rows)


def predicted_table(channels: tuple[int, ...], dtype: str) -> list[str]:
    """Predicted microseconds, and their share that the floor is, where nothing was measured."""
    rows: dict[str, list[Any]] = {name: [name] for name in PASSES}
    head = ["pass"]
    for gpu, image in ((H100, IMAGE), (H200, SMALL_IMAGE), (H100, SMALL_IMAGE)):
        for k in channels:
            head.append(f"{gpu.name}, {image[0]} x {image[1]} x {image[2]}, {k}")
            for name, one in layer_passes(k, dtype, image).items():
                some = one.on(gpu)
                rows[name].append(f"{us(seconds(some)):.0f} ({floor(some) / seconds(some):.2f})")
    return table(head, rows.values())


def plain_floor(k: int, image: tuple[int, int, int], gpu: Gpu) -> float:
    """Seconds that one pass of a plain convolution k -> k needs at least, in half precision."""
    pixels = image[0] * image[1] * image[2]
    return max(2 * k * pixels * 2 / gpu.memory, 2 * 9 * k * k * pixels / gpu.half)


def best_others() -> dict[tuple[int, str], float]:
    """Seconds of cuDNN's fastest convolution that the H200 measured; its bits may differ from run to run."""
    found = {}
    for k, variant, name, times in measured():
        others = [time for who, time in times.items() if who.startswith("cuDNN") and "deterministic" not in who]
        if variant == "as chosen" and others:
            found[k, name] = min(others)
    return found


def cudnn_table(passes: dict[int, dict[str, Pass]], known: dict[tuple[int, str], float]) -> list[str]:
    """One plain convolution of cuDNN beside our pass, microseconds."""
    others, rows = best_others(), []
    for k, layer in passes.items():
        for name in PLAIN:
            lowest = plain_floor(k, IMAGE, H200)
            ours = seconds(layer[name].on(H200))
            plain = others[k, name]
            rows.append(["H200", "16 x 256 x 256", k, name, us(lowest), us(plain), lowest / plain, us(ours),
                         us(known.get((k, name)))])  # fmt: skip
    time, k, image = PUBLISHED
    ours = seconds(layer_passes(k, image=image, names=("forward + ReLU",))["forward + ReLU"].on(H100))
    lowest = plain_floor(k, image, H100)
    where = " x ".join(map(str, image))
    rows.append(["H100", where, k, "forward (quoted)", us(lowest), us(time), lowest / time, us(ours), None])
    head = ["GPU", "image", "C = K", "pass", "cuDNN's floor", "cuDNN measured", "floor / measured", "ours predicted"]
    return table([*head, "ours measured"], rows)


def step_table(passes: dict[int, dict[str, Pass]], known: dict[tuple[int, str], float]) -> list[str]:
    """A layer's step without norm, beside that of a plain layer by cuDNN, microseconds."""
    others, rows = best_others(), []
    for k, layer in passes.items():
        plain = sum(others[k, name] for name in PLAIN)
        rows.append([k, "plain, cuDNN", 3 * us(plain_floor(k, IMAGE, H200)), None, us(plain), 1.0, None])
        for step, names in STEPS.items():
            some = [one for name in names for one in layer[name].on(H200)]
            on_h100 = seconds([one for name in names for one in layer[name].on(H100)])
            times = [known.get((k, name)) for name in names]
            time = None if None in times else sum(filter(None, times))
            rows.append(
                [f"{k}", step, us(floor(some)), us(seconds(some)), us(time), time and time / plain, us(on_h100)]
            )
    head = ["C = K", "step", "floor", "predicted", "measured", "measured / cuDNN's", "predicted on an H100"]
    return table(head, rows)


def figures(passes: dict[int, dict[str, Pass]], fit: list[str]) -> dict[str, Any]:
    """What this Triton compiled: registers, stack (bytes), CTAs, instructions, remarks of ptxas, and predicted
    microseconds; and how the model fits."""
    found = {}
    for k, layer in passes.items():
        for one in layer.values():
            for launch, part in zip(one.launches, one.on(H200), strict=True):
                made = launch.made
                found[f"{k} {launch.one.direction}"] = {
                    "registers": made.registers, "stack": made.stack, "CTAs": made.programs,
                    "instructions": len(made.code), "matrix": part.matrix,
                    "remarks": list(warnings(made.ptx, HOPPER.target.arch)), "predicted": round(part.seconds * 1e6, 1),
                }  # fmt: skip
    return {"triton": triton.__version__, "launches": found, "fit": fit}


def differences(here: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Lines on what another Triton compiled otherwise: remarks, stack, kind of matrix instruction; and by how much its
    registers and predicted times differ."""
    lines, ratios, registers = [], [], []
    for name, mine in here["launches"].items():
        theirs = other["launches"][name]
        ratios.append(theirs["predicted"] / mine["predicted"])
        registers.append(theirs["registers"] - mine["registers"])
        for what in ("remarks", "stack", "matrix", "CTAs"):
            if mine[what] != theirs[what]:
                lines.append(f"- {name}: {what} {theirs[what] or 'none'}, here {mine[what] or 'none'}")
    return [
        f"Triton {other['triton']} compiles the same {len(ratios)} kernels: registers differ by {min(registers)} to "
        f"{max(registers):+}, predicted times are {min(ratios):.2f} to {max(ratios):.2f} of those here. With its code:",
        "",
        *other["fit"], *(lines or ["- Remarks of ptxas, stack, kinds of matrix instructions and CTAs are the same."]),
    ]  # fmt: skip


def report(
    passes: dict[int, dict[str, Pass]], dtype: str, compared: list[Fit], beside: dict[str, Any] | None = None
) -> str:
    """All tables, as Markdown. `compared`: what was measured of these passes. `beside`: the figures of another
    Triton."""
    known = {(one.width, one.name): one.measured for one in compared if one.variant == "as chosen"}
    other = [] if beside is None else [*differences(figures(passes, []), beside), ""]
    lines = [
        "# What the model says of the Triton kernels", "",
        f"`python benchmarks/gpu_model.py`, triton {triton.__version__}, torch {torch.__version__}, {dtype}, even "
        "splits into shared and two tasks. *Predicted* is arithmetic (`benchmarks/roofline.py` says with which "
        "constants); *measured* is one H200, with Triton 3.6 (`gpu/h200_confirmed.md`).", "",
        *fit_of(compared), "", *other,
        "## Microseconds on an H200, 16 x 256 x 256", "",
        "The floor is the bytes that must move through DRAM, or the necessary products, whichever takes longer. The "
        "times of several launches are added up.", "", *time_table(passes, known),
        "", "## What a launch asks for, per pixel", "",
        "Bytes; on the shared path those from and to L2 count twice. Instructions are those of a warp, turns those of "
        "the main loop.", "", *count_table(passes),
        "", "## Predicted microseconds (share of it that the floor is)", "", *predicted_table(tuple(passes), dtype),
        "", "## One convolution of cuDNN", "", "Microseconds; cuDNN with all weights, ours with the routed ones.", "",
        *cudnn_table(passes, known),
        "", "## A step of a layer without norm", "", "Microseconds on an H200.", "", *step_table(passes, known), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", type=Path, help="write the tables here instead of printing them")
    parser.add_argument("--json", type=Path, help="write here what this Triton compiled, and no tables")
    parser.add_argument("--beside", type=Path, help="what --json wrote under another Triton")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128], choices=(16, 32, 64, 128))
    arguments = parser.parse_args()
    passes = {k: layer_passes(k, arguments.dtype) for k in arguments.channels}
    compared = fits(passes) if arguments.dtype == "bf16" else []
    if arguments.json:
        arguments.json.write_text(json.dumps(figures(passes, fit_of(compared)), indent=1))
        return
    beside = json.loads(arguments.beside.read_text()) if arguments.beside else None
    text = report(passes, arguments.dtype, compared, beside)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
