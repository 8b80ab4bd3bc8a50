"""`Task` describes everything that training, prediction, evaluation, reports and deployment need to know of a task.

A kind of task is a subclass of `Task` in a file of its own in this folder. The rest of the package asks this
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
"""The profiles of metrics, {profile: {kind: class}}: the class measures tasks of that kind as the profile does. The
class of a kind itself measures as the paper does; a subclass, `class X(Kind, profile=..)`, measures by another
profile."""


class Score(NamedTuple):
    """A number that training shows of held-out examples: its name in history.json, its title, its unit, and how many
    decimals are shown."""

    name: str
    title: str
    unit: str
    digits: int


class Measure(NamedTuple):
    """A number of a case in metrics.json, and a column of tables.

    Attributes:
        title: the heading of the column.
        place: where the number stands in a case's metrics: keys, the task's name first.
        digits: how many decimals are shown.
        less_is_better: whether a smaller number is a better one.
        factor: tables show the number times this factor.
        unit: the unit of the number, "" for none.
        sd: whether the SD over cases says anything (the SD of numbers that are 0 or 1 does not).
        signed: whether the number is shown with its sign.
        tested: whether an experiment tests differences of the number between methods.
        test: the test: "wilcoxon" for few cases, "bootstrap" for thousands of cases with values such as 0 or 1.
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
    """Part of a table of results. In the table `caption` of one method it is the row `title`; with several methods it
    is a table of its own, which has a row for each method. `columns` holds the measure of each column."""

    caption: str
    title: str
    columns: tuple[Measure, ...]


class Scene(NamedTuple):
    """Where the volumes of a case are measured.

    Attributes:
        mask: the body, bool [Z, Y, X].
        regions: the regions of the true labels by name, each bool [Z, Y, X]; "organs" is the union of all labels.
        spacing: the size of a voxel along Z, Y and X in mm.
    """

    mask: np.ndarray
    regions: dict[str, np.ndarray]
    spacing: tuple[float, float, float]


class Contours(NamedTuple):
    """Outlines of labels [Y, X] that are drawn over a panel: those of the truth are solid, those of the prediction are
    dashed. None means that there are no such labels. `names` has the value of each label by name."""

    true: np.ndarray | None
    predicted: np.ndarray | None
    names: Mapping[str, int]


class Panel(NamedTuple):
    """A picture of a slice [Y, X] in the figure of a case. `scale` holds cmap, vmin and vmax as matplotlib takes them;
    `unit` is the unit of the colour bar, "" for none."""

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
    """One task. The fields of a subclass, except `name` and `about`, are the options of its kind in a configuration.

    Args:
        name: the name of the task and of its filter group.
        target: the name of the cohort's target that the task learns; "": the target is called as the task is.
        about: this target as the cohort describes it; None before a cohort was read.
    """

    kind: ClassVar[str]
    reads: ClassVar[str]
    """The kind of target that the task learns (`data.targets.TARGET_KINDS`)."""
    dtype: ClassVar[Any] = np.float32
    """The dtype in which a predicted volume is written."""
    profile: ClassVar[str] = PAPER
    """The profile of metrics that the class measures by (`PROFILES`)."""

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
        """Raise InputError, which names the option, if an option can't have its value; or if the target can't be
        learnt, once that is known."""

    def refuse(self, option: str, value: Any, expected: str) -> InputError:
        """The InputError, to be raised, that says which value this option of the task has and what was expected."""
        return InputError(f"tasks.{self.name}.{option}={value!r}: expected {expected}")

    @property
    def of(self) -> Target:
        """The target as the cohort describes it. The task must be bound to a cohort."""
        assert self.about is not None, f"task {self.name!r} is not bound to a cohort's target"
        return self.about

    @property
    def per_image(self) -> bool:
        """Does the task have one value for each image (not one for each voxel)?"""
        return self.reads in ("number", "class")

    # --- the network --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def outputs(self) -> int:
        """How many channels, or numbers for each image, the network gives for this task."""

    @abstractmethod
    def start(self) -> Tensor:
        """The biases [outputs] of the untrained head. With them an untrained network predicts the mean of the
        target."""

    # --- eq. 2 --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def likelihood(self) -> nn.Module:
        """A module that computes log p(y | x) of eq. 2. It is called with the output [M, outputs, ..], the target [M,
        ..] as the sampler gives it, and a bool tensor [M] that says which examples have a target. It returns one number
        for each example, [M]: the mean over the voxels of the example."""

    # --- while it is trained ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def scores(self) -> tuple[Score, ...]:
        """The numbers that training shows of held-out examples."""

    @abstractmethod
    def tally(self, output: Tensor, target: Tensor, there: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Sums over the examples of a batch, float64, which may be added up over batches. Only examples that have the
        target count (`there`, bool [M]); of volumes only the voxels in the `mask`, bool [M, 1, ..]."""

    @abstractmethod
    def scored(self, sums: Mapping[str, Tensor]) -> dict[str, float | None]:
        """The numbers of `scores` by name, from the sums of `tally`; None for a number that was not measured."""

    # --- what it predicts ---------------------------------------------------------------------------------------------

    @property
    def output_unit(self) -> float:
        """The value of one unit of the network's output, in the unit of the target (400 for an output in 400 HU)."""
        return 1.0

    @abstractmethod
    def link(self, output: Tensor, votes: bool = False) -> Tensor:
        """What is averaged over drawn architectures, [N, outputs, ..] like the output: numbers, or probabilities of
        classes. With `votes` the most probable class has 1 and all other classes have 0; the class with the largest
        mean of these is the one that most architectures chose."""

    def deployed(self, output: Tensor) -> Tensor:
        """The output as users want it: numbers in the unit of the target, or probabilities of classes."""
        return self.link(output) * self.output_unit

    @abstractmethod
    def predicted(self, mean: Tensor, variance: Tensor) -> dict[str, np.ndarray]:
        """The arrays that are written, by name, each [N, ..]: "" is the prediction itself, "uncertainty" is its SD over
        draws; a kind may add others. `mean` and `variance` are those of `link` over draws, [N, outputs, ..]."""

    @property
    def uncertainty_unit(self) -> str:
        """The unit of the SD over draws."""
        return self.of.unit

    def cell(self, value: Any) -> str:
        """The text of a table's cell for a value of an image, true or predicted."""
        return repr(float(value))

    def value(self, cell: str) -> Any:
        """The value of an image that a table's cell holds. Raises ValueError if the cell holds no such value."""
        number = float(cell)
        if not math.isfinite(number):
            raise ValueError(f"{cell!r} is not finite")
        return number

    # --- how good it is, by its profile -------------------------------------------------------------------------------

    @abstractmethod
    def metrics(self, true: Any, predicted: Any, scene: Scene | None) -> dict[str, Any]:
        """The metrics of a case, as JSON can hold them. `true` and `predicted` are volumes [Z, Y, X] in a `scene`, or
        the values of an image. Raises InputError for values that can't be scored."""

    @property
    @abstractmethod
    def measures(self) -> tuple[Measure, ...]:
        """The measures that summarise how good the task is."""

    @property
    def relative(self) -> Measure:
        """The measure whose relative changes between methods make up Delta p. Zero must mean something in its unit."""
        return self.measures[0]

    @abstractmethod
    def rows(self, regions: Sequence[str]) -> list[ScoreRow]:
        """The rows of the tables that show results. `regions` names the regions that any case has (`Scene.regions`)."""

    @property
    def details(self) -> tuple[Measure, ...]:
        """The measures that the table of cases shows beside `measures`."""
        return ()

    @abstractmethod
    def rules(self) -> dict[str, str]:
        """How each number is measured, {key of the metrics: sentence}."""

    # --- what it looks like -------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def title(self) -> str:
        """The title of the task's tables and figures."""

    def panels(self, background: Panel, true: np.ndarray | None, predicted: np.ndarray | None) -> list[Panel]:
        """The pictures of a slice of a case. `background` is the panel of the MR; `true` and `predicted` are [Y, X],
        None for what there is not."""
        return []

    def chart(self, cases: Iterable[Mapping[str, Any]]) -> Scatter | Matrix | None:
        """The figure over all images, from the `metrics` of each; None for a kind that has none."""
        return None

    def place(self, *keys: str) -> tuple[str, ...]:
        """The place of a number in a case's metrics: the task's name, then the keys."""
        return (self.name, *keys)
