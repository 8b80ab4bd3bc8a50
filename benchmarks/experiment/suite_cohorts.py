"""Makes cohorts of images whose best grouping is known, or can be found by trying. `suite.py` calls this file.

    python -m benchmarks.experiment.suite_cohorts digits FOLDER      needs scikit-learn, which ships the digits
    python -m benchmarks.experiment.suite_cohorts identical FOLDER   teachers; or related, disjoint, two_alike

digits: an image has two handwritten digits, one overlapping the other, and there is a task for each place. Both tasks
are the same at another place, so kernels for edges and strokes can be shared, but not those that know the place.

Teachers: every task is a number that a small random network ("teacher") gives for an image of random texture. The tasks
have the same teacher (identical), teachers with the first layer in common (related), teachers of different colours of
the image (disjoint); or, of three tasks, two have almost the same teacher and the third another one (two_alike).
Training targets are noisy, those of validation and test are not.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

SIZE = 32
DIGITS = {"train": 1500, "val": 1000, "test": 2000}  # images; of 900, 400 and 497 of the digits
TEXTURES = {"train": 2000, "val": 1000, "test": 2000}
NOISE = 0.3  # SD of the training targets' noise over that of the targets
TEACHERS = ("identical", "related", "disjoint", "two_alike")


class Images(NamedTuple):
    """The images of one split: pixels uint8 [N, SIZE, SIZE] or [N, SIZE, SIZE, 3], and the targets of each task [N]."""

    pixels: np.ndarray
    targets: dict[str, np.ndarray]


# --- digits -----------------------------------------------------------------------------------------------------------


def overlaid_digits() -> dict[str, Images]:
    """The images of each split, made of digits that no other split has."""
    from sklearn.datasets import load_digits

    digits, classes = load_digits(return_X_y=True)
    small = torch.from_numpy(digits).float().view(-1, 1, 8, 8) / 16
    large = F.interpolate(small, size=(20, 20), mode="bilinear").clamp(0, 1)[:, 0].numpy()
    rng = np.random.default_rng(5)
    of_split = np.split(rng.permutation(len(large)), (900, 1300))
    return {
        split: _overlay(rng, large[own], classes[own], count)
        for own, (split, count) in zip(of_split, DIGITS.items(), strict=True)
    }


def _overlay(rng: np.random.Generator, digits: np.ndarray, classes: np.ndarray, count: int) -> Images:
    """Images of two digits each. `digits` are [n, 20, 20], 0 to 1; the digit on the left is further up."""
    canvas = np.zeros((count, SIZE, SIZE), np.float32)
    targets = {}
    for task, first in (("left", 0), ("right", 8)):
        chosen = rng.integers(len(digits), size=count)
        targets[task] = classes[chosen]
        for image, digit, (y, x) in zip(
            canvas, digits[chosen], rng.integers(first, first + 5, (count, 2)), strict=True
        ):
            place = image[y : y + 20, x : x + 20]
            np.maximum(place, digit, out=place)
    return Images((canvas * 255).round().astype(np.uint8), targets)


# --- teachers ---------------------------------------------------------------------------------------------------------


class Teacher:
    """A random network of three convolutions with 16 kernels each, and a weighted mean of squares at its end."""

    def __init__(self, seed: int, first: Teacher | None = None, colours: Sequence[int] = (0, 1, 2)) -> None:
        """`first` is another teacher, whose first layer this one takes; `colours` are the channels that it sees."""
        generator = torch.Generator().manual_seed(seed)
        self.layers = [
            (
                torch.randn(16, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5,
                torch.randn(16, generator=generator) * 0.2,
            )
            for channels in (3, 16, 16)
        ]
        self.head = torch.randn(16, generator=generator)
        if first is not None:
            self.layers[0] = first.layers[0]
        self.seen = torch.tensor([float(colour in colours) for colour in range(3)]).view(1, 3, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Images x [N, 3, H, W] -> a number for each, [N]."""
        x = x * self.seen
        for index, (weight, bias) in enumerate(self.layers):
            x = F.conv2d(x, weight, bias, padding=1)
            x = F.relu((x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True))
            x = F.max_pool2d(x, 2) if index < 2 else x
        return x.square().mean((2, 3)) @ self.head


class Almost:
    """A teacher that is nearly `most`: a tenth of its variance comes from the teacher `rest`."""

    def __init__(self, most: Teacher, rest: Teacher) -> None:
        self.most, self.rest = most, rest

    def __call__(self, x: Tensor) -> Tensor:
        most, rest = (_standardised(teacher(x)) for teacher in (self.most, self.rest))
        return 0.9**0.5 * most + 0.1**0.5 * rest


def teachers(kind: str) -> list[Any]:
    """The teachers of the tasks."""
    one = Teacher(1)
    return {
        "identical": [one, one],
        "related": [one, Teacher(2, first=one)],
        "disjoint": [Teacher(1, colours=[0]), Teacher(2, colours=[2])],
        "two_alike": [one, Almost(one, Teacher(2)), Teacher(3)],
    }[kind]


def _standardised(y: Tensor) -> Tensor:
    return (y - y.mean()) / y.std()


def textures(kind: str) -> dict[str, Images]:
    """The images of each split, and what the teachers say of them."""
    generator = torch.Generator().manual_seed(9)
    count = sum(TEXTURES.values())
    coarse = torch.randn(count, 3, 8, 8, generator=generator) * (
        0.3 + 1.5 * torch.rand(count, 3, 1, 1, generator=generator)
    )
    fine = torch.randn(count, 3, SIZE, SIZE, generator=generator) * torch.rand(count, 3, 1, 1, generator=generator)
    x = F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic") + 0.5 * fine
    pixels = (127.5 + 32 * x).clamp(0, 255).round()
    seen = (pixels - 127.5) / 32  # what the file holds, not what was rounded away
    found: dict[str, Images] = {}
    targets = [_standardised(teacher(seen)) for teacher in teachers(kind)]
    noisy = [y + NOISE * torch.randn(count, generator=generator) for y in targets]
    whole, first = pixels.byte().permute(0, 2, 3, 1).numpy(), 0
    for split, many in TEXTURES.items():
        part = slice(first, first + many)
        values = noisy if split == "train" else targets
        found[split] = Images(whole[part], {f"task{i}": y[part].numpy() for i, y in enumerate(values, 1)})
        first += many
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def write(folder: Path, splits: dict[str, Images]) -> None:
    """Write FOLDER/SPLIT_0000.png .., list.csv and targets.json."""
    folder.mkdir(parents=True)
    tasks = list(next(iter(splits.values())).targets)
    with (folder / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", *tasks, "split"])
        for split, (pixels, targets) in splits.items():
            for index, image in enumerate(tqdm(pixels, desc=split, unit="image")):
                name = f"{split}_{index:04d}.png"
                Image.fromarray(image).save(folder / name)
                rows.writerow([name, *(_cell(targets[task][index]) for task in tasks), split])
    whole = all(y.dtype.kind == "i" for y in next(iter(splits.values())).targets.values())
    about = {"classes": [f"digit {digit}" for digit in range(10)]} if whole else {}
    (folder / "targets.json").write_text(json.dumps(dict.fromkeys(tasks, about), indent=2) + "\n")


def _cell(target: Any) -> str:
    """The cell of the list with the class, or the number, of one image."""
    return f"digit {target}" if target.dtype.kind == "i" else f"{target:.6f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("digits", *TEACHERS))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write(arguments.folder, overlaid_digits() if arguments.what == "digits" else textures(arguments.what))


if __name__ == "__main__":
    main()
