"""The figures of a run: where kernels went (Fig. 3 left), what they see (Fig. 3 right), the training, the cases.

Every function returns a matplotlib `Figure` of its own; nothing touches pyplot or a display. Colours are those of
Fig. 3: first task blue, shared green, second task pink; hatching keeps them apart in grey. All slices are [Y, X]
planes of RAS+ volumes: rows grow towards the patient's front, columns towards the patient's right. They are drawn as
radiologists hang them: front up, the patient's right on the viewer's left, true proportions in mm.

`history` is the trainer's history.json: groups (shared first), curves and allocation (mean p and mean entropy per
SFG layer in network order, for each recorded step).
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
from .metrics import heading, organ_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

CT_WINDOW_HU = (-400, 1000)
"""Display window of both CTs: fat, muscle and bone apart; gas black."""

P = ParamSpec("P")
R = TypeVar("R")
_DPI = 150


class _Style(NamedTuple):
    colour: str
    hatch: str


_SHARED_STYLE = _Style("#4daf6a", "...")
_TASK_COLOURS = ("#4a86c5", "#e57fb0", "#e0a030", "#8b6bb5", "#a0755a", "#45b5bd")
_TASK_HATCHES = ("///", "\\\\\\", "xxx", "+++", "ooo", "---")
_ORGAN_COLOURS = ("#ffb000", "#29b6f6", "#ff5252", "#69d26e", "#d05ce3", "#ff8a50", "#00c4a7", "#e6ee56")
_LABELS = "labels"
_NO_ALLOCATION = "This network draws no filter groups:\nthere is no allocation to show."


def _by_defaults(draw: Callable[P, R]) -> Callable[P, R]:
    """Drawn with matplotlib's own defaults: a reader's matplotlibrc may ask for fonts or programs that aren't here."""

    @functools.wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> R:
        from matplotlib import style

        with style.context("default"):
            return draw(*arguments, **options)

    return drawn


@_by_defaults
def allocation(history: Mapping[str, Any]) -> Figure:
    """Fig. 3 left: share of each layer's probability mass per group at the end of training, first layer on top.

    The share of a group is the mean over the layer's kernels of p; each bar runs task 1 | shared | further tasks.
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
    """The shares of `allocation` against the training step, one panel per layer."""
    shares, groups = history["allocation"]["p"], history["groups"]
    if not shares:
        return _message(_NO_ALLOCATION)
    figure, panels = _panels(len(shares), 4, 2.7, 1.8, share_axes=True)
    order = _bar_order(groups)
    steps = history["allocation"]["step"]
    if len(steps) == 1:  # an area needs two
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
    """Mean entropy of p per layer in nats: at the end, and over training; at most ln(T + 1), where p is uniform.

    The lines on the right have the colours of the bars on the left.
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


PSNR, DICE = "held-out PSNR in mask [dB]", "held-out Dice, mean"


@_by_defaults
def curves(history: Mapping[str, Any]) -> Figure:
    """Course of training: objective (eq. 2), negative log likelihood of each task, PSNR (dB) and Dice of a held-out
    slice and (points) of the validation split, temperature, learning rate. A series without any number has no panel;
    None is a gap between measurements."""
    recorded = history["curves"]
    named = {"objective (eq. 2)": recorded["objective"]}
    named |= {f"negative log likelihood: {task}": values for task, values in recorded["nll"].items()}
    named |= {PSNR: recorded["psnr"], DICE: recorded["dice"]}
    named |= {"temperature": recorded["temperature"], "learning rate": recorded["learning_rate"]}
    series = {title: np.array(values, dtype=float) for title, values in named.items()}  # None becomes NaN
    series = {title: values for title, values in series.items() if np.isfinite(values).any()}
    if not series:
        return _message("No training step was recorded.")
    styles = _styles(history["groups"])
    colours = {f"negative log likelihood: {task}": styles[task].colour for task in recorded["nll"]}
    steps = np.array(recorded["step"])
    figure, panels = _panels(len(series), 4, 3, 2.1)
    for axes, (title, values) in zip(panels, series.items(), strict=True):
        there = np.isfinite(values)
        colour = colours.get(title, "0.25")
        axes.plot(steps[there], values[there], color=colour, linewidth=1.2, marker=_marker(steps[there]))
        if title in (PSNR, DICE):
            measured = history["validation"]["psnr" if title == PSNR else "dice"]
            points = np.array(measured, dtype=float)
            axes.plot(history["validation"]["step"], points, "o", color=colour, markersize=4, fillstyle="none")
        axes.set_title(_literal(title), fontsize=10)
        axes.set_yscale("log" if title == "learning rate" else "linear")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        _strip(axes)
    figure.supxlabel("training step", fontsize=10)
    return figure


@_by_defaults
def activation_maps(
    image: np.ndarray, maps: Mapping[str, Sequence[tuple[str, np.ndarray]]], spacing: tuple[float, float]
) -> Figure:
    """Fig. 3 right: the input slice, and beside it one row of activation maps per group.

    Args:
        image: [H, W], the MR slice.
        maps: group -> (title, [H, W]) of each map, all groups in the order of `history["groups"]`; an empty list
            where a group has no kernel. Each map has its own grey scale.
        spacing: (y, x) in mm per pixel of the image; maps may be coarser, they cover the same field.
    """
    if not maps:
        return _message(_NO_ALLOCATION)
    extent = _extent(image, spacing)
    styles = _styles(list(maps))
    order = [list(maps)[index] for index, _ in _bar_order(list(maps))]
    rows, columns = len(maps), max(1, *map(len, maps.values()))
    width = min(2.2, 10 / (columns + 2))  # of a map; the input is twice as large
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
    """The learnt architecture as a graph: a column per layer, a node per group that has kernels, and edges to the
    groups of the next layer that read it (section 2.1: shared reads shared, a task reads shared and its own).

    A node's area and number are its kernels. Shortcuts of residual blocks are not drawn.

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
    # Which groups each column has; the input is read by all.
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
    """Every subject's value for each method: a dot, joined to the same subject's of the other methods; the bar is
    their mean.

    Args:
        scores: measure (the panel's title) -> method -> a value for each subject, NaN where there is none; the same
            methods and subjects in the same order in all panels.
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


@_by_defaults
def case_panel(
    mr: np.ndarray | None,
    ct_true: np.ndarray | None,
    ct_pred: np.ndarray | None,
    labels_true: np.ndarray | None,
    labels_pred: np.ndarray | None,
    uncertainty: np.ndarray | None,
    spacing: tuple[float, float],
    title: str,
    label_names: Mapping[str, int],
    uncertainty_unit: str = "HU",
) -> Figure:
    """One slice of one case: MR | CT | synthetic CT | difference | labels on the MR | uncertainty.

    A panel without its data is left out. The difference is synthetic minus true, its scale symmetric about 0. In the
    labels panel the truth is solid, the prediction dashed.

    Args:
        mr, ct_true, ct_pred: [Y, X]; any scale, HU, HU.
        labels_true, labels_pred: [Y, X], integers, 0 = background.
        uncertainty: [Y, X], standard deviation over draws, in `uncertainty_unit`.
        spacing: (y, x) in mm per pixel.
        label_names: name -> label value; value 0, the background, may be left out.

    Raises:
        InputError: no image at all, or slices of different shapes.
    """
    shapes = {
        plane.shape for plane in (mr, ct_true, ct_pred, labels_true, labels_pred, uncertainty) if plane is not None
    }
    if len(shapes) > 1:
        raise InputError(f"the slices of case {title!r} differ in shape: {sorted(shapes)}")
    ct_scale = {"cmap": "gray", "vmin": CT_WINDOW_HU[0], "vmax": CT_WINDOW_HU[1]}
    panels: list[tuple[str, np.ndarray, dict[str, Any], str]] = []  # name, image, scale, unit of the colour bar
    if mr is not None:
        panels.append(("MR", mr, _mr_scale(mr), ""))
    if ct_true is not None:
        panels.append(("CT", ct_true, ct_scale, "HU"))
    if ct_pred is not None:
        panels.append(("synthetic CT", ct_pred, ct_scale, "HU"))
    if not panels:
        raise InputError(f"case {title!r} has no image to show")
    _, background, background_scale, _ = panels[0]
    if ct_true is not None and ct_pred is not None:
        difference = np.subtract(ct_pred, ct_true, dtype=np.float32)
        panels.append(("synthetic CT - CT", difference, _difference_scale(difference), "HU"))
    if labels_true is not None or labels_pred is not None:
        panels.append((_LABELS, background, background_scale, ""))
    if uncertainty is not None:
        panels.append(("uncertainty: SD over draws", uncertainty, {"cmap": "magma", "vmin": 0}, uncertainty_unit))

    extent = _extent(background, spacing)
    figure, all_axes = _panels(len(panels), 3, 3.6, 3 * extent[3] / extent[1] + 0.5)
    for axes, (name, image, scale, unit) in zip(all_axes, panels, strict=True):
        drawn = _show(axes, image, extent, **scale)
        _mark_sides(axes)
        axes.set_title(name, fontsize=10)
        if unit:
            bar = figure.colorbar(drawn, cax=axes.inset_axes((1.02, 0, 0.04, 1)))
            bar.ax.set_title(unit, fontsize=8)
            bar.ax.tick_params(labelsize=7)
        if name == _LABELS:
            handles = _draw_contours(axes, spacing, labels_true, labels_pred, label_names)
            columns = int(figure.get_figwidth() / 1.4)
            figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(_literal(title), fontsize=11)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG, whole or not at all; the folder must exist."""
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
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _message(text: str) -> Figure:
    figure = _figure(6, 1.5)
    figure.text(0.5, 0.5, text, ha="center", va="center", color="0.3")
    return figure


def _panels(
    count: int, most_columns: int, width: float, height: float, share_axes: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, each of width x height inches, in rows as even as they come."""
    rows = math.ceil(count / most_columns)
    columns = math.ceil(count / rows)
    figure = _figure(width * columns, height * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share_axes, sharey=share_axes)
    for axes in grid.flat[count:]:
        axes.remove()
    for axes in grid.flat[count - columns : count]:  # the lowest of each column, above a blank too, numbers the x axis
        axes.tick_params(labelbottom=True)
    return figure, list(grid.flat[:count])


def _strip(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _styles(groups: Sequence[str]) -> dict[str, _Style]:
    """Style of each group; `groups` begins with shared."""
    tasks = itertools.cycle(map(_Style, _TASK_COLOURS, _TASK_HATCHES))
    return dict(zip(groups, itertools.chain([_SHARED_STYLE], tasks), strict=False))


def _bar_order(groups: Sequence[str]) -> list[tuple[int, _Style]]:
    """Index and style of the groups as Fig. 3 stacks them: task 1, shared, further tasks."""
    indexed = list(enumerate(_styles(groups).values()))
    return [indexed[1], indexed[0], *indexed[2:]]


def _filling(style: _Style) -> dict[str, Any]:
    return {"facecolor": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0.5}


def _marker(values: Sequence[float]) -> str:
    """A dot on each measurement, unless there are so many that they run together."""
    return "." if len(values) <= 40 else ""


def _literal(text: str) -> str:
    """Text for matplotlib in which a dollar sign is only that, not the start of a formula."""
    return text.replace("$", r"\$")


def _extent(plane: np.ndarray, spacing: tuple[float, float]) -> tuple[float, float, float, float]:
    """Left, right, bottom, top of a [Y, X] slice in mm."""
    return 0.0, plane.shape[1] * spacing[1], 0.0, plane.shape[0] * spacing[0]


def _radiological(plane: np.ndarray) -> np.ndarray:
    """[Y, X] of a RAS+ slice with the patient's right first; with the origin below, the front is up."""
    return plane[:, ::-1]


def _show(axes: Axes, plane: np.ndarray, extent: tuple[float, float, float, float], **scale: Any) -> AxesImage:
    axes.set(xticks=[], yticks=[])
    image = axes.imshow(_radiological(plane), origin="lower", extent=extent, aspect="equal", **scale)
    axes.autoscale(False)  # or contours would move the frame
    return image


def _mark_sides(axes: Axes) -> None:
    box = {"facecolor": "black", "edgecolor": "none", "alpha": 0.6, "pad": 1.5}
    for x, side in ((0.04, "R"), (0.96, "L")):
        axes.text(x, 0.5, side, transform=axes.transAxes, ha="center", va="center", color="white", fontsize=9, bbox=box)


def _mr_scale(mr: np.ndarray) -> dict[str, Any]:
    """MR has no unit: from black to the brightness that all but 1 in 200 pixels keep below."""
    low, high = np.percentile(mr, (0.5, 99.5))
    return {"cmap": "gray", "vmin": low, "vmax": high}


def _difference_scale(difference: np.ndarray) -> dict[str, Any]:
    """Symmetric about 0; whole hundreds of HU, so that slices of like quality share a scale."""
    limit = 100 * max(1, math.ceil(np.percentile(np.abs(difference), 99) / 100))
    return {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}


def _draw_contours(
    axes: Axes,
    spacing: tuple[float, float],
    labels_true: np.ndarray | None,
    labels_pred: np.ndarray | None,
    label_names: Mapping[str, int],
) -> list[Any]:
    """Draws the outline of each organ and returns the handles of their legend."""
    from matplotlib.lines import Line2D

    organs = organ_values(label_names)
    colours = dict(zip(organs, itertools.cycle(_ORGAN_COLOURS), strict=False))
    handles, shown = [], set()
    for labels, drawing in ((labels_true, "truth"), (labels_pred, "prediction")):
        if labels is None:
            continue
        line: Any = "-" if drawing == "truth" else "--"
        handles.append(Line2D([], [], color="0.2", linestyle=line, label=drawing))
        for name, value in organs.items():
            inside = np.pad(_radiological(labels == value), 1)  # the padding closes the outline at the slice's edge
            if inside.any():
                shown.add(name)
                y, x = ((np.arange(size) - 0.5) * step for size, step in zip(inside.shape, spacing, strict=True))
                axes.contour(x, y, inside, levels=[0.5], colors=[colours[name]], linestyles=line, linewidths=1.4)
    key = {name: _literal(heading(name)) for name in organs if name in shown}
    return handles + [Line2D([], [], color=colours[name], linewidth=3, label=text) for name, text in key.items()]
