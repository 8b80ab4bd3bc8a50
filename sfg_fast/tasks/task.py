"""What a task is: everything that training, prediction, evaluation, reports and deployment need to know of one.

A kind of task is a subclass of `Task` in a file of its own in this folder. The rest of the package asks the
description and knows no task by its name.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor, nn

from ..data.targets import Target
from ..errors import InputError

KINDS: dict[str, type[Task]] = {}
"""All kinds of tasks by the names that `tasks:` in a configuration gives them."""

PAPER = "paper"
PROFILES: dict[str, dict[str, type[Task]]] = {PAPER: KINDS}
"""The profiles of metrics: for each the kinds of tasks that it measures, and what measures them. A kind of its own
measures by the paper's; by another profile a subclass of it does, `class X(Kind, profile=..)`."""


class Score(NamedTuple):
    """A number that training shows of held-out examples: its name in history.json, its title and its unit."""

    name: str
    title: str
    unit: str
    digits: int


class Measure(NamedTuple):
    """A number of a case in metrics.json, and a column of tables.

    title: its heading. place: where it stands in a case's metrics, the task first. factor: what it is shown times.
    sd: whether its SD over cases says anything (that of right and wrong does not). signed: whether it is shown with its
    sign. tested: whether an experiment tests differences of it between methods;
    test: how: "wilcoxon" (few cases, one number each), or "bootstrap" (thousands, such as 0 or 1).
    """

    title: str
    place: tuple[str, ...]
    digits: int
    less_is_better: bool = False
    factor: float = 1.0
    unit: str = ""
    sd: bool = True
    signed: bool = False
    tested: bool = True
    test: str = "wilcoxon"


class ScoreRow(NamedTuple):
    """A row of the table `caption` for one method (or a table of its own, with a row for each of several methods):
    what it says, and a measure for each column."""

    caption: str
    title: str
    columns: tuple[Measure, ...]


class Scene(NamedTuple):
    """What the volumes of a case are measured in: the body `mask`, bool [Z, Y, X], and the named `regions` of its true
    labels, each bool [Z, Y, X], "organs" being all of them. spacing: of the voxels along Z, Y, X, in mm."""

    mask: np.ndarray
    regions: dict[str, np.ndarray]
    spacing: tuple[float, float, float]


class Contours(NamedTuple):
    """Outlines of labels [Y, X] over a panel: the truth solid, the prediction dashed; None: there is none."""

    true: np.ndarray | None
    predicted: np.ndarray | None
    names: Mapping[str, int]


class Panel(NamedTuple):
    """A picture of a slice [Y, X] in the figure of a case. scale: cmap, vmin, vmax as matplotlib has them; unit: of the
    colour bar, "" for none."""

    title: str
    plane: np.ndarray
    scale: Mapping[str, Any]
    unit: str = ""
    contours: Contours | None = None


class Scatter(NamedTuple):
    """The figure of a task of numbers over all images: predicted against true values, both [images]."""

    title: str
    unit: str
    true: np.ndarray
    predicted: np.ndarray


class Matrix(NamedTuple):
    """The figure of a task of classes over all images: counts [true class, predicted class]."""

    title: str
    names: tuple[str, ...]
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Task(ABC):
    """One task. The fields of a kind, but `name` and `about`, are its options in the configuration.

    Args:
        name: of the task; the name of its filter group.
        target: what it learns in the cohort; "" for the target of the task's own name.
        about: that target as the cohort has it, None before a cohort was read.
    """

    kind: ClassVar[str]
    reads: ClassVar[str]
    """The kind of target that it learns (`data.targets.TARGET_KINDS`)."""
    dtype: ClassVar[Any] = np.float32
    """Of the prediction of a volume, as it is written."""
    profile: ClassVar[str] = PAPER
    """What it is measured by (`PROFILES`)."""

    name: str
    target: str = ""
    about: Target | None = dataclasses.field(default=None, kw_only=True)

    def __init_subclass__(cls, kind: str = "", profile: str = "", **others: Any) -> None:
        super().__init_subclass__(**others)
        if kind:
            cls.kind = kind
            KINDS[kind] = cls
        if profile:
            cls.profile = profile
            PROFILES.setdefault(profile, {})[cls.kind] = cls

    # --- its target ---------------------------------------------------------------------------------------------------

    def check(self) -> None:  # noqa: B027
        """InputError, naming the option, for one that can't be, also for the target, if that is known."""

    def refuse(self, option: str, value: Any, expected: str) -> InputError:
        return InputError(f"tasks.{self.name}.{option}={value!r}: expected {expected}")

    @property
    def of(self) -> Target:
        """The target, once a cohort was read."""
        assert self.about is not None, f"task {self.name!r} is not bound to a cohort's target"
        return self.about

    @property
    def per_image(self) -> bool:
        """Is there one value for each image (not one for each voxel)?"""
        return self.reads in ("number", "class")

    # --- the network --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Channels of the network's output."""

    @abstractmethod
    def start(self) -> Tensor:
        """Biases [outputs] that the head starts from, so that an untrained network predicts the mean."""

    # --- eq. 2 --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def likelihood(self) -> nn.Module:
        """log p(y | x) of eq. 2: called with the output [M, outputs, ..], the target [M, ..] as the sampler gives it,
        and which examples have one, bool [M]; it gives one number for each example, [M], the mean over its voxels."""

    # --- what it is watched by ----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def scores(self) -> tuple[Score, ...]:
        """What training shows of held-out examples."""

    @abstractmethod
    def tally(self, output: Tensor, target: Tensor, there: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Sums over a batch, float64, that add up over batches, of the examples that have the target (`there`, bool
        [M]), volumes in the `mask`, bool [M, 1, H, W]."""

    @abstractmethod
    def scored(self, sums: Mapping[str, Tensor]) -> dict[str, float | None]:
        """The numbers of `scores` from what `tally` added up; None for what was not measured."""

    # --- what it predicts ---------------------------------------------------------------------------------------------

    @property
    def output_unit(self) -> float:
        """The network's output is in this many units of the target."""
        return 1.0

    @abstractmethod
    def link(self, output: Tensor, votes: bool = False) -> Tensor:
        """What is averaged over drawn architectures: numbers, probabilities of classes; votes: one for the most
        probable class, none for others (their mean has its mode where it is largest). [N, outputs, ..] as given."""

    def deployed(self, output: Tensor) -> Tensor:
        """The output in the units of users: of the target, or probabilities."""
        return self.link(output) * self.output_unit

    @abstractmethod
    def predicted(self, mean: Tensor, variance: Tensor) -> dict[str, np.ndarray]:
        """What is written, from mean and variance of `link` over draws, [N, outputs, ..]: "" the prediction itself,
        [N, ..], "uncertainty", its SD over draws, and what else a kind has."""

    @property
    def uncertainty_unit(self) -> str:
        """Of the SD over draws."""
        return self.of.unit

    def cell(self, value: Any) -> str:
        """A value of an image, true or predicted, as a table holds it."""
        return repr(float(value))

    def value(self, cell: str) -> Any:
        """The value of an image that a cell of a table holds. ValueError for what can't be one."""
        number = float(cell)
        if not math.isfinite(number):
            raise ValueError(f"{cell!r} is not finite")
        return number

    # --- how good it is, by its profile -------------------------------------------------------------------------------

    @abstractmethod
    def metrics(self, true: Any, predicted: Any, scene: Scene | None) -> dict[str, Any]:
        """The metrics of a case from its truth and its prediction: volumes [Z, Y, X] in a `scene`, or the values of an
        image; what JSON can hold. InputError for values that can't be scored."""

    @property
    @abstractmethod
    def measures(self) -> tuple[Measure, ...]:
        """The headline numbers."""

    @property
    def relative(self) -> Measure:
        """The one that relative changes between methods (Delta p) are taken of: it has a zero that means something."""
        return self.measures[0]

    @abstractmethod
    def rows(self, regions: Sequence[str]) -> list[ScoreRow]:
        """The rows of the tables that results are given in. regions: those that any case has, of `Scene.regions`."""

    @property
    def details(self) -> tuple[Measure, ...]:
        """What the table of cases has beside the headline numbers."""
        return ()

    @abstractmethod
    def rules(self) -> dict[str, str]:
        """How its numbers are measured, in words."""

    # --- what it looks like -------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def title(self) -> str:
        """Of tables and figures."""

    def panels(self, background: Panel, true: np.ndarray | None, predicted: np.ndarray | None) -> list[Panel]:
        """Pictures of a slice [Y, X] of a case. background: the MR."""
        return []

    def chart(self, cases: Iterable[Mapping[str, Any]]) -> Scatter | Matrix | None:
        """The figure over all images, from their `metrics`."""
        return None

    def place(self, *keys: str) -> tuple[str, ...]:
        """A place in a case's metrics."""
        return (self.name, *keys)
