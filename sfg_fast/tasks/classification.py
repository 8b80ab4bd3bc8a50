"""The kind `classification`: a class for every image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import override

from ..tables import heading
from .classes import ClassTask
from .task import Matrix, Measure, Scene, Score, ScoreRow


@dataclasses.dataclass(frozen=True)
class Classification(ClassTask, kind="classification"):
    """A class for each image.

    Args:
        classes: the names of the classes in the order of the outputs. This order is the cohort's; the option only
            checks it.
        flips: whether a mirrored image is of the same class.
    """

    reads = "class"

    classes: list[str] | None = None
    flips: bool = True

    @override
    def check(self) -> None:
        super().check()
        if self.classes is not None and self.about is not None and self.classes != list(self.names):
            expected = f"null, or the cohort's in their order: {', '.join(self.names)} (targets.json can say another)"
            raise self.refuse("classes", self.classes, expected)
        if self.about is not None and len(self.about.names) < 2:
            raise self.refuse(
                "target", self.about.name, f"two classes or more, the cohort has {list(self.about.names)}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the network's outputs."""
        return tuple(sorted(self.of.names, key=self.of.names.__getitem__))

    @property
    @override
    def title(self) -> str:
        return heading(self.name)

    # --- while it is trained ------------------------------------------------------------------------------------------

    @property
    @override
    def scores(self) -> tuple[Score, ...]:
        return (Score("accuracy", "accuracy [%]", "%", 1),)

    @override
    def tally(self, output: Tensor, target: Tensor, there: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        return {
            "correct": (output.argmax(1) == target)[there].sum().double(),
            "images": there.sum().double(),
        }

    @override
    def scored(self, sums: Mapping[str, Tensor]) -> dict[str, float | None]:
        some = bool(sums) and bool(sums["images"] > 0)
        return {"accuracy": 100 * (sums["correct"] / sums["images"]).item() if some else None}

    # --- what it predicts ---------------------------------------------------------------------------------------------

    def predicted(self, mean: Tensor, variance: Tensor) -> dict[str, np.ndarray]:
        """Beside the prediction and its uncertainty there is "p_CLASS", the mean probability of each class, [N]."""
        found = super().predicted(mean, variance)
        found[""] = mean.argmax(1).numpy()
        return found | {f"p_{name}": mean[:, index].numpy() for index, name in enumerate(self.names)}

    @override
    def cell(self, value: Any) -> str:
        return self.names[int(value)]

    @override
    def value(self, cell: str) -> int:
        return self.names.index(cell)

    # --- how good it is -----------------------------------------------------------------------------------------------

    def metrics(self, true: int, predicted: int, scene: Scene | None) -> dict[str, Any]:
        """{"true", "predicted": names of classes, "correct": 1 or 0, "recall": {the true class: 1 or 0}}."""
        correct = int(int(true) == int(predicted))
        name = self.cell(true)
        return {"true": name, "predicted": self.cell(predicted), "correct": correct, "recall": {name: correct}}

    @property
    @override
    def measures(self) -> tuple[Measure, ...]:
        return (Measure("Accuracy [%]", self.place("correct"), 2, factor=100.0, unit="%", sd=False, test="bootstrap"),)

    @override
    def rows(self, regions: Sequence[str]) -> list[ScoreRow]:
        recalls = [
            Measure(f"of {name} [%]", self.place("recall", name), 2, factor=100.0, sd=False) for name in self.names
        ]
        return [ScoreRow(self.title, "", (*self.measures, *recalls))]

    @override
    def rules(self) -> dict[str, str]:
        return {"correct": "1 where the predicted class of an image is the true one, else 0; accuracy is its mean"}

    # --- what it looks like -------------------------------------------------------------------------------------------

    @override
    def chart(self, cases: Iterable[Mapping[str, Any]]) -> Matrix:
        counts = np.zeros((len(self.names),) * 2, dtype=np.int64)
        for case in cases:
            counts[self.names.index(case["true"]), self.names.index(case["predicted"])] += 1
        return Matrix(self.title, self.names, counts)
