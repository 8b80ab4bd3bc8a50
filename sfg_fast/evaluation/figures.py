"""The figures of a run: where kernels went (Fig. 3 left), what they see (Fig. 3 right), the training, the cases, and
for cohorts of images the predictions against the truth.

Every function returns a matplotlib `Figure` of its own; nothing touches pyplot or a display. Colours are those of
Fig. 3: the first task is blue, shared is green, the second task is pink. Hatching keeps them apart in grey. All slices
are [Y, X] planes of RAS+ volumes: rows grow towards the patient's front, columns towards the patient's right. They are
drawn as radiologists hang them: the front is up, the patient's right is on the viewer's left, and proportions are true
in mm.

The argument `history` is the trainer's history.json: groups (shared first), curves, and allocation (mean p and mean
entropy per SFG layer in network order, for each recorded step).
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from ..errors import InputError
from ..files import replacing
from ..tables import heading
from ..tasks.task import Contours, Matrix, Panel, Scatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

P = ParamSpec("P")
R = TypeVar("R")
_DPI = 150


class _Style(NamedTuple):
    colour: str
    hatch: str


_SHARED_STYLE = _Style("#4daf6a", "...")
_TASK_COLOURS = ("#4a86c5", "#e57fb0", "#e0a030", "#8b6bb5", "#a0755a", "#45b5bd")
_TASK_HATCHES = ("///", "\\\\\\", "xxx", "+++", "ooo", "---")
_LABEL_COLOURS = ("#ffb000", "#29b6f6", "#ff5252", "#69d26e", "#d05ce3", "#ff8a50", "#00c4a7", "#e6ee56")
_NO_ALLOCATION = "This network draws no filter groups:\nthere is no allocation to show."


def _by_defaults(draw: Callable[P, R]) -> Callable[P, R]:
    """Makes a function draw with matplotlib's own defaults, because the user's matplotlibrc may ask for fonts or
    programs that aren't here."""

    @functools.wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> R:
        from matplotlib import style

        with style.context("default"):
            return draw(*arguments, **options)

    return drawn


@_by_defaults
def allocation(history: Mapping[str, Any]) -> Figure:
    """Draws Fig. 3 left: the share of each layer's probability mass per group at the end of training, first layer on
    top.

    The share of a group is the mean of p over the layer's kernels. Each bar runs task 1 | shared | further tasks.
    """
    shares, groups = history["allocation"]["p"], history["groups"]
    if not shares:
        return _message(_NO_ALLOCATION)
    layers = list(map(_literal, shares))
    final = np.array([rows[-1] for rows in shares.values()])  # [layers, groups]
    figure = _figure(8, 1.1 + 0.36 * len(shares))
    axes = figure.subplots()
    left = np.zeros(len(shares))
    for index, style in _bar_order(groups):
        share = final[:, index]
        bars = axes.barh(layers, share, left=left, height=0.75, label=_literal(groups[index]), **_filling(style))
        percent = [f"{value:.0%}" if value >= 0.08 else "" for value in share]
        for text in axes.bar_label(bars, percent, label_type="center", fontsize=8):
            if text.get_text():
                text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.2})
        left += share
    axes.set(xlim=(0, 1), ylim=(len(shares) - 0.5, -0.5), xlabel="share of the kernels' probability mass")
    axes.xaxis.set_major_formatter("{x:.0%}")
    _strip(axes)
    figure.legend(loc="outside upper center", ncols=len(groups), frameon=False, handlelength=2.5, handleheight=1.2)
    return figure


@_by_defaults
def allocation_over_training(history: Mapping[str, Any]) -> Figure:
    """Draws the shares of `allocation` against the training step, in one panel per layer."""
    shares, groups = history["allocation"]["p"], history["groups"]
    if not shares:
        return _message(_NO_ALLOCATION)
    figure, panels = _panels(len(shares), 4, 2.7, 1.8, share_axes=True)
    order = _bar_order(groups)
    steps = history["allocation"]["step"]
    if len(steps) == 1:  # an area needs two steps
        steps = [steps[0], steps[0] + 1]
    for axes, (layer, values) in zip(panels, shares.items(), strict=True):
        values = np.broadcast_to(np.array(values), (len(steps), len(groups)))
        areas = axes.stackplot(steps, *(values[:, index] for index, _ in order))
        for area, (index, style) in zip(areas, order, strict=True):
            area.set(label=_literal(groups[index]), **_filling(style))
        axes.set_title(_literal(layer), fontsize=9)
        axes.set(xlim=(steps[0], steps[-1]), ylim=(0, 1))
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(labelsize=8)
    figure.supxlabel("training step", fontsize=10)
    figure.supylabel("share of the kernels' probability mass", fontsize=10)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(groups), frameon=False, handlelength=2.5)
    return figure


@_by_defaults
def entropy(history: Mapping[str, Any]) -> Figure:
    """Draws the mean entropy of p per layer in nats, on the left at the end of training, on the right over training.

    It is at most ln(T + 1), where p is uniform. The lines on the right have the colours of the bars on the left.
    """
    from matplotlib import colormaps

    layers = history["allocation"]["entropy"]
    if not layers:
        return _message(_NO_ALLOCATION)
    bound = math.log(len(history["groups"]))
    figure = _figure(10, max(3.2, 1.1 + 0.3 * len(layers)))
    final, course = figure.subplots(1, 2)
    colours = colormaps["viridis"](np.linspace(0.05, 0.9, len(layers)))
    final.barh(list(map(_literal, layers)), [values[-1] for values in layers.values()], color=colours, height=0.75)
    final.axvline(bound, color="0.3", linestyle="--")
    final.set(title="at the end of training", xlabel="mean entropy of p [nats]", xlim=(0, 1.1 * bound))
    final.set_ylim(len(layers) - 0.5, -0.5)
    steps = history["allocation"]["step"]
    for values, colour in zip(layers.values(), colours, strict=True):
        course.plot(steps, values, color=colour, marker=_marker(steps))
    course.axhline(bound, color="0.3", linestyle="--")
    uniform = f"uniform: ln {len(history['groups'])} = {bound:.2f}"
    course.text(0.98, 1.015 * bound, uniform, transform=course.get_yaxis_transform(), ha="right", fontsize=9)
    course.set(title="over training", xlabel="training step", ylim=(0, 1.1 * bound))
    for axes in (final, course):
        _strip(axes)
    return figure


@_by_defaults
def curves(history: Mapping[str, Any]) -> Figure:
    """Draws the course of training: objective (eq. 2), negative log likelihood of each task, its scores on held-out
    examples and, as points, on the validation split, temperature and learning rate.

    A series without any number has no panel. None in a series is a gap between measurements.
    """
    recorded, looks = history["curves"], history["validation"]
    styles = _styles(history["groups"])
    series = [_Series("objective (eq. 2)", recorded["objective"])]
    for task, values in recorded["nll"].items():
        series.append(_Series(f"negative log likelihood: {task}", values, styles[task].colour))
    for name, values in recorded["scores"].items():
        colour = styles[name.partition("/")[0]].colour
        series.append(_Series(f"held-out {history['titles'][name]}", values, colour, looks["scores"][name]))
    series += [_Series(name.replace("_", " "), recorded[name]) for name in ("temperature", "learning_rate")]
    series = [one for one in series if np.isfinite(np.array(one.values, dtype=float)).any()]
    if not series:
        return _message("No training step was recorded.")
    steps = np.array(recorded["step"])
    figure, panels = _panels(len(series), 4, 3, 2.1)
    for axes, (title, recorded_values, colour, validation) in zip(panels, series, strict=True):
        values = np.array(recorded_values, dtype=float)  # None becomes NaN
        there = np.isfinite(values)
        axes.plot(steps[there], values[there], color=colour, linewidth=1.2, marker=_marker(steps[there]))
        if validation is not None:
            points = np.array(validation, dtype=float)
            axes.plot(looks["step"], points, "o", color=colour, markersize=4, fillstyle="none")
        axes.set_title(_literal(title), fontsize=10)
        axes.set_yscale("log" if title == "learning rate" else "linear")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        _strip(axes)
    figure.supxlabel("training step", fontsize=10)
    return figure


class _Series(NamedTuple):
    """A panel of `curves`: `values` has a value for each recorded step, `validation` one for each look at the
    validation split."""

    title: str
    values: Sequence[float | None]
    colour: str = "0.25"
    validation: Sequence[float | None] | None = None


@_by_defaults
def activation_maps(
    image: np.ndarray, maps: Mapping[str, Sequence[tuple[str, np.ndarray]]], spacing: tuple[float, float]
) -> Figure:
    """Draws Fig. 3 right: the input slice, and beside it one row of activation maps per group.

    Args:
        image: [H, W], the MR slice.
        maps: group -> (title, [H, W]) of each map, all groups in the order of `history["groups"]`; a group without
            kernels has an empty list. Each map has its own grey scale.
        spacing: (y, x) in mm per pixel of the image; maps may be coarser, but cover the same field.
    """
    if not maps:
        return _message(_NO_ALLOCATION)
    extent = _extent(image, spacing)
    styles = _styles(list(maps))
    order = [list(maps)[index] for index, _ in _bar_order(list(maps))]
    rows, columns = len(maps), max(1, *map(len, maps.values()))
    width = min(2.2, 10 / (columns + 2))  # the width of a map in inches; the input is twice as wide
    figure = _figure(width * (columns + 2) + 0.6, rows * (width * extent[3] / extent[1] + 0.2) + 0.3)
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=[2, *[1] * columns])
    axes = figure.add_subplot(grid[:, 0])
    _show(axes, image, extent, **_mr_scale(image))
    _mark_sides(axes)
    axes.set_title("input", fontsize=10)
    for index, group in enumerate(order):
        row = [figure.add_subplot(grid[index, column + 1]) for column in range(columns)]
        row[0].set_ylabel(_literal(group), color=styles[group].colour, fontsize=11, fontweight="bold")
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, (title, activation) in zip(row, maps[group], strict=False):
            _show(axes, activation, extent, cmap="gray")
            axes.set_title(_literal(title), fontsize=8, pad=2)
            axes.spines[:].set(visible=True, color=styles[group].colour, linewidth=2)
        if not maps[group]:
            row[0].text(0.5, 0.5, "no kernel", ha="center", va="center", color="0.5", transform=row[0].transAxes)
    return figure


@_by_defaults
def architecture(kernels: Mapping[str, Sequence[int]], groups: Sequence[str]) -> Figure:
    """Draws the learnt architecture as a graph: a column per layer, a node per group that has kernels, and edges to the
    groups of the next layer that read it (section 2.1: shared reads shared, a task reads shared and its own).

    A node's area and number show how many kernels the group has. Shortcuts of residual blocks are not drawn.

    Args:
        kernels: layer -> number of kernels in each group, in the order of the network.
        groups: names of the groups, shared first; the others are tasks, each with a head in the last column.
    """
    if not kernels:
        return _message(_NO_ALLOCATION)
    order = _bar_order(groups)
    height = {index: -row for row, (index, _) in enumerate(order)}
    styles = list(_styles(groups).values())
    tasks = range(1, len(groups))
    # The groups that each column has; all groups read the input.
    columns = [[index for index, count in enumerate(counts) if count] for counts in kernels.values()] + [list(tasks)]
    most = max(map(max, kernels.values()))
    figure = _figure(1.6 + 1.15 * len(columns), 0.9 + 0.9 * len(groups))
    axes = figure.subplots()
    for x, (sources, readers) in enumerate(itertools.pairwise(columns)):
        for source, reader in itertools.product(sources, readers):
            if source in (0, reader):
                colour = styles[source].colour
                axes.plot([x + 1, x + 2], [height[source], height[reader]], color=colour, linewidth=1.6, zorder=1)
    for reader in columns[0]:
        axes.plot([0, 1], [height[0], height[reader]], color="0.6", linewidth=1.6, zorder=1)
    axes.scatter([0], [height[0]], s=260, marker="s", color="0.6", zorder=2)
    for x, counts in enumerate(kernels.values(), 1):
        for index in columns[x - 1]:
            area = 120 + 900 * counts[index] / most
            axes.scatter([x], [height[index]], s=area, color=styles[index].colour, edgecolor="0.2", zorder=2)
            axes.text(x, height[index], str(counts[index]), ha="center", va="center", fontsize=8, zorder=3)
    for task in tasks:
        axes.scatter(
            [len(columns)], [height[task]], s=260, marker="s", color=styles[task].colour, edgecolor="0.2", zorder=2
        )
    axes.set(xlim=(-0.5, len(columns) + 0.5), ylim=(-len(groups) + 0.4, 0.6))
    axes.set_xticks(range(len(columns) + 1), ["input", *map(_literal, kernels), "heads"], rotation=30, ha="right")
    axes.set_yticks([height[index] for index, _ in order], [_literal(groups[index]) for index, _ in order])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    return figure


@_by_defaults
def subjects(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draws every subject's value for each method as a dot, joined to the same subject's dots of the other methods. A
    bar marks the mean of a method.

    Args:
        scores: measure (the panel's title) -> method -> a value for each subject, NaN where there is none. All panels
            have the same methods and subjects in the same order.
    """
    names = list(next(iter(scores.values())))
    figure, panels = _panels(len(scores), 3, 4.2, 1.1 + 0.42 * len(names))
    for number, (axes, (measure, by_method)) in enumerate(zip(panels, scores.items(), strict=True)):
        values = np.array([by_method[name] for name in names], dtype=float)  # [methods, subjects]
        rows = np.arange(len(names))
        axes.plot(values, rows, color="0.8", linewidth=0.7, zorder=1)
        axes.scatter(values, np.repeat(rows, values.shape[1]), s=16, color="#4a86c5", alpha=0.7, zorder=2)
        means = [row[np.isfinite(row)].mean() if np.isfinite(row).any() else math.nan for row in values]
        axes.scatter(means, rows, s=260, marker="|", color="0.1", linewidths=2, zorder=3)
        axes.set_yticks(rows, map(_literal, names) if number == 0 else [""] * len(names), fontsize=9)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(_literal(measure), fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        _strip(axes)
    return figure


def mr_panel(mr: np.ndarray) -> Panel:
    """The panel of an MR slice [Y, X]."""
    return Panel("MR", mr, _mr_scale(mr))


def uncertainty_panel(uncertainty: np.ndarray, task: str, unit: str) -> Panel:
    """The panel of a slice [Y, X] of a task's standard deviation over draws, in the unit `unit`."""
    return Panel(f"{task}: SD over draws", uncertainty, {"cmap": "magma", "vmin": 0}, unit)


@_by_defaults
def case_panel(panels: Sequence[Panel], spacing: tuple[float, float], title: str) -> Figure:
    """Draws one slice of one case as its tasks picture it: MR | CT | synthetic CT | difference | labels on the MR | ..

    Outlines of the truth are solid, those of the prediction dashed.

    Args:
        panels: the pictures, whose planes all have the same shape [Y, X].
        spacing: (y, x) in mm per pixel.
        title: the title of the figure.

    Raises:
        InputError: there is no panel, or the planes differ in shape.
    """
    if not panels:
        raise InputError(f"case {title!r} has no image to show")
    shapes = {panel.plane.shape for panel in panels}
    for panel in panels:
        if panel.contours is not None:
            shapes |= {labels.shape for labels in panel.contours[:2] if labels is not None}
    if len(shapes) > 1:
        raise InputError(f"the slices of case {title!r} differ in shape: {sorted(shapes)}")
    extent = _extent(panels[0].plane, spacing)
    figure, all_axes = _panels(len(panels), 3 if len(panels) <= 6 else 4, 3.6, 3 * extent[3] / extent[1] + 0.5)
    colours = itertools.cycle(_LABEL_COLOURS)
    handles: dict[str, Any] = {}  # those of the legend, by what they stand for
    maps = sum(panel.contours is not None for panel in panels)
    for axes, panel in zip(all_axes, panels, strict=True):
        drawn = _show(axes, panel.plane, extent, **panel.scale)
        _mark_sides(axes)
        axes.set_title(_literal(panel.title), fontsize=10)
        if panel.unit:
            bar = figure.colorbar(drawn, cax=axes.inset_axes((1.02, 0, 0.04, 1)))
            bar.ax.set_title(_literal(panel.unit), fontsize=8)
            bar.ax.tick_params(labelsize=7)
        if panel.contours is not None:
            of_labels = dict(zip(panel.contours.names, colours, strict=False))
            of = f" ({panel.title})" if maps > 1 else ""
            handles |= _draw_contours(axes, spacing, panel.contours, of_labels, of)
    if handles:
        columns = int(figure.get_figwidth() / 1.4)
        figure.legend(handles=handles.values(), loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(_literal(title), fontsize=11)
    return figure


@_by_defaults
def chart(shown: Scatter | Matrix) -> Figure:
    """Draws the predictions of a task against the truth, for all images together."""
    return _scatter(shown) if isinstance(shown, Scatter) else _matrix(shown)


def _scatter(shown: Scatter) -> Figure:
    """Draws predicted against true numbers, and the line where they are equal."""
    if not shown.true.size:
        return _message("No image has both a true value and a predicted one.")
    figure = _figure(5, 5)
    axes = figure.subplots()
    both = np.concatenate([shown.true, shown.predicted])
    margin = 0.03 * (both.max() - both.min()) or 1.0
    ends = (both.min() - margin, both.max() + margin)
    alpha = min(0.7, max(0.02, 5 / math.sqrt(shown.true.size)))
    axes.scatter(shown.true, shown.predicted, s=12, color=_TASK_COLOURS[0], alpha=alpha, linewidths=0)
    axes.plot(ends, ends, color="0.3", linestyle="--", linewidth=1)
    unit = f" [{shown.unit}]" if shown.unit else ""
    axes.set(xlim=ends, ylim=ends, aspect="equal", title=_literal(shown.title))
    axes.set(xlabel=_literal(f"true{unit}"), ylabel=_literal(f"predicted{unit}"))
    axes.grid(alpha=0.25)
    _strip(axes)
    return figure


def _matrix(shown: Matrix) -> Figure:
    """Draws a confusion matrix: counts, coloured by their share of the true class."""
    size = len(shown.names)
    cells = min(size, 20)
    figure = _figure(2.2 + 0.6 * cells, 1.8 + 0.5 * cells)
    axes = figure.subplots()
    shares = shown.counts / np.maximum(shown.counts.sum(1, keepdims=True), 1)
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (true, predicted), count in np.ndenumerate(shown.counts if size == cells else np.empty((0, 0))):
        dark = shares[true, predicted] > 0.6
        axes.text(predicted, true, str(count), ha="center", va="center", fontsize=9, color="white" if dark else "0.1")
    names = list(map(_literal, shown.names))
    axes.set_xticks(range(size), names, rotation=30, ha="right")
    axes.set_yticks(range(size), names)
    axes.set(xlabel="predicted", ylabel="true", title=_literal(shown.title))
    axes.tick_params(length=0)
    bar = figure.colorbar(drawn)
    bar.ax.set_title("share", fontsize=8)
    bar.ax.yaxis.set_major_formatter("{x:.0%}")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG, whole or not at all. The folder must exist. Raises InputError if the file can't be
    written."""
    with replacing(path) as partial:
        partial.write_bytes(_png(figure))


def to_data_uri(figure: Figure) -> str:
    """The figure as a PNG inside a `data:` URI, for an HTML page that stands alone."""
    return "data:image/png;base64," + base64.b64encode(_png(figure)).decode("ascii")


@_by_defaults
def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    """An empty figure of width x height inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _message(text: str) -> Figure:
    figure = _figure(6, 1.5)
    figure.text(0.5, 0.5, text, ha="center", va="center", color="0.3")
    return figure


def _panels(
    count: int, most_columns: int, width: float, height: float, share_axes: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in rows as even as possible, each panel width x height inches."""
    rows = math.ceil(count / most_columns)
    columns = math.ceil(count / rows)
    figure = _figure(width * columns, height * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share_axes, sharey=share_axes)
    for axes in grid.flat[count:]:
        axes.remove()
    # The lowest panel of each column numbers the x axis, also above a blank.
    for axes in grid.flat[count - columns : count]:
        axes.tick_params(labelbottom=True)
    return figure, list(grid.flat[:count])


def _strip(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _styles(groups: Sequence[str]) -> dict[str, _Style]:
    """The style of each group; `groups` begins with shared."""
    tasks = itertools.cycle(map(_Style, _TASK_COLOURS, _TASK_HATCHES))
    return dict(zip(groups, itertools.chain([_SHARED_STYLE], tasks), strict=False))


def _bar_order(groups: Sequence[str]) -> list[tuple[int, _Style]]:
    """The index and style of each group, in the order in which Fig. 3 stacks them: task 1, shared, further tasks."""
    indexed = list(enumerate(_styles(groups).values()))
    return [indexed[1], indexed[0], *indexed[2:]]


def _filling(style: _Style) -> dict[str, Any]:
    return {"facecolor": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0.5}


def _marker(values: Sequence[float]) -> str:
    """A dot on each measurement, unless there are so many that they run together."""
    return "." if len(values) <= 40 else ""


def _literal(text: str) -> str:
    """The text such that matplotlib shows a dollar sign, and doesn't take it for the start of a formula."""
    return text.replace("$", r"\$")


def _extent(plane: np.ndarray, spacing: tuple[float, float]) -> tuple[float, float, float, float]:
    """Left, right, bottom, top of a [Y, X] slice in mm."""
    return 0.0, plane.shape[1] * spacing[1], 0.0, plane.shape[0] * spacing[0]


def _radiological(plane: np.ndarray) -> np.ndarray:
    """A slice [Y, X] of a RAS+ volume with the patient's right first. Drawn with its origin below, the front is up."""
    return plane[:, ::-1]


def _show(axes: Axes, plane: np.ndarray, extent: tuple[float, float, float, float], **scale: Any) -> AxesImage:
    axes.set(xticks=[], yticks=[])
    image = axes.imshow(_radiological(plane), origin="lower", extent=extent, aspect="equal", **scale)
    axes.autoscale(False)  # contours would move the frame otherwise
    return image


def _mark_sides(axes: Axes) -> None:
    box = {"facecolor": "black", "edgecolor": "none", "alpha": 0.6, "pad": 1.5}
    for x, side in ((0.04, "R"), (0.96, "L")):
        axes.text(x, 0.5, side, transform=axes.transAxes, ha="center", va="center", color="white", fontsize=9, bbox=box)


def _mr_scale(mr: np.ndarray) -> dict[str, Any]:
    """The grey scale of an MR, which has no unit: 1 in 200 pixels is black, and 1 in 200 is white."""
    low, high = np.percentile(mr, (0.5, 99.5))
    return {"cmap": "gray", "vmin": low, "vmax": high}


def _draw_contours(
    axes: Axes, spacing: tuple[float, float], contours: Contours, colours: Mapping[str, str], of: str
) -> dict[str, Any]:
    """Draws the outline of each label, and returns the handles of the legend by what they stand for. of: the text that
    stands behind a label's name in the legend."""
    from matplotlib.lines import Line2D

    handles: dict[str, Any] = {}
    shown = set()
    for labels, drawing, line in ((contours.true, "truth", "-"), (contours.predicted, "prediction", "--")):
        if labels is None:
            continue
        style: Any = line
        handles[f"{line} {drawing}"] = Line2D([], [], color="0.2", linestyle=style, label=drawing)
        for name, value in contours.names.items():
            inside = np.pad(_radiological(labels == value), 1)  # the padding closes the outline at the slice's edge
            if inside.any():
                shown.add(name)
                y, x = ((np.arange(size) - 0.5) * step for size, step in zip(inside.shape, spacing, strict=True))
                axes.contour(x, y, inside, levels=[0.5], colors=[colours[name]], linestyles=style, linewidths=1.4)
    for name, colour in colours.items():
        if name in shown:
            handles[f"{name}{of}"] = Line2D([], [], color=colour, linewidth=3, label=_literal(f"{heading(name)}{of}"))
    return handles
