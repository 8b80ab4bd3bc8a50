"""The figures show the right numbers in the right place: bars, gaps, orientation, proportions, outlines, counts."""

import base64
import math

import numpy as np
import pytest

pytest.importorskip("matplotlib")
import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from sfg_fast.errors import InputError
from sfg_fast.evaluation import figures
from sfg_fast.tasks.task import Contours, Matrix, Panel, Scatter

from .described import ct_and_organs

LAYERS = ["first", "deep.conv1", "last"]
FINAL = np.array([[0.9, 0.06, 0.04], [0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])  # shared, ct, organs


@pytest.fixture
def history():
    third = [1 / 3] * 3
    return {
        "groups": ["shared", "ct", "organs"],
        "curves": {
            "step": [0, 10, 20, 30],
            "objective": [4.0, 3.0, 2.0, 1.5],
            "nll": {"ct": [3.0, 2.0, 1.0, 0.5], "organs": [1.0, 0.9, 0.8, 0.7]},
            "scores": {"ct/psnr": [None, 21.0, None, 23.0], "organs/dice": [None, None, None, None]},
            "temperature": [1.0, 0.8, 0.6, 0.4],
            "learning_rate": [1e-3, 1e-3, 1e-4, 1e-5],
        },
        "titles": {"ct/psnr": "ct: PSNR in mask [dB]", "organs/dice": "organs: mean Dice"},
        "validation": {"step": [20], "nll": [1.0], "scores": {"ct/psnr": [22.0], "organs/dice": [None]}},
        "allocation": {
            "step": [0, 15, 30],
            "p": {layer: [third, third, row.tolist()] for layer, row in zip(LAYERS, FINAL, strict=True)},
            "entropy": {layer: [1.0, 0.9, final] for layer, final in zip(LAYERS, (0.2, 0.5, 0.7), strict=True)},
        },
    }


def _pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(float) / 255


def _shown(figure, axes):
    """The pixels inside a panel's frame as they appear on the page, first row on top."""
    page = _pixels(figure)
    box = axes.get_window_extent()
    height = page.shape[0]
    return page[int(height - box.y1) + 3 : int(height - box.y0) - 3, int(box.x0) + 3 : int(box.x1) - 3]


def _panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title() == title)


def _titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_allocation_stacks_task_shared_task(history):
    figure = figures.allocation(history)
    (axes,) = figure.axes
    assert [container.get_label() for container in axes.containers] == ["ct", "shared", "organs"]
    left = np.zeros(3)
    for container, group in zip(axes.containers, (1, 0, 2), strict=True):
        np.testing.assert_allclose([bar.get_x() for bar in container], left)
        np.testing.assert_allclose([bar.get_width() for bar in container], FINAL[:, group])
        left += FINAL[:, group]
    figure.draw_without_rendering()
    assert [label.get_text() for label in axes.get_yticklabels()] == LAYERS
    ys = [bar.get_window_extent().y0 for bar in axes.containers[0]]
    assert ys == sorted(ys, reverse=True)  # the first layer on top
    assert [text.get_text() for text in axes.texts[:3]] == ["", "30%", "30%"]  # 6 % is too narrow for its number


def test_groups_have_the_papers_colours_and_read_in_grey(history):
    ct, shared, organs = (container[0] for container in figures.allocation(history).axes[0].containers)
    red, green, blue = to_rgb(ct.get_facecolor())
    assert blue > green > red
    red, green, blue = to_rgb(shared.get_facecolor())
    assert green > max(red, blue)
    red, green, blue = to_rgb(organs.get_facecolor())
    assert red > blue > green
    assert len({bar.get_hatch() for bar in (ct, shared, organs)}) == 3


def test_many_tasks_keep_distinct_styles(history):
    tasks = [f"task {i}" for i in range(6)]
    history["groups"] = ["shared", *tasks]
    history["allocation"]["p"] = {"only": [[1 / 7] * 7]}
    bars = [container[0] for container in figures.allocation(history).axes[0].containers]
    assert len({bar.get_facecolor() for bar in bars}) == len({bar.get_hatch() for bar in bars}) == 7


def test_allocation_over_training_ends_where_the_bars_end(history):
    figure = figures.allocation_over_training(history)
    assert _titles(figure) == LAYERS
    for axes, row in zip(figure.axes, FINAL, strict=True):
        tops = [area.get_paths()[0].vertices for area in axes.collections]
        heights = [vertices[vertices[:, 0] == 30][:, 1].max() for vertices in tops]
        np.testing.assert_allclose(heights, np.cumsum(row[[1, 0, 2]]), atol=1e-6)


def test_one_recorded_step_is_an_area_too(history):
    history["allocation"] |= {"step": [5], "p": {"only": [[0.2, 0.5, 0.3]]}}
    (axes,) = figures.allocation_over_training(history).axes
    box = axes.collections[0].get_paths()[0].get_extents()
    assert box.width > 0
    assert box.height == pytest.approx(0.5)


def test_entropy_has_its_upper_bound(history):
    final, course = figures.entropy(history).axes
    np.testing.assert_allclose([bar.get_width() for bar in final.patches], [0.2, 0.5, 0.7])
    assert final.lines[0].get_xdata() == [math.log(3)] * 2
    *layers, bound = course.lines
    assert bound.get_ydata() == [math.log(3)] * 2
    for line, bar in zip(layers, final.patches, strict=True):
        assert line.get_ydata()[-1] == bar.get_width()
        assert to_rgb(line.get_color()) == to_rgb(bar.get_facecolor())


def test_a_network_without_draws_says_so(history):
    history["allocation"] = {"step": [], "p": {}, "entropy": {}}
    for draw in (figures.allocation, figures.allocation_over_training, figures.entropy):
        assert "no filter groups" in draw(history).texts[0].get_text()


def test_curves_skip_what_was_not_measured(history):
    figure = figures.curves(history)
    assert _titles(figure) == [
        "objective (eq. 2)",
        "negative log likelihood: ct",
        "negative log likelihood: organs",
        "held-out ct: PSNR in mask [dB]",
        "temperature",
        "learning rate",
    ]
    psnr, validation = _panel(figure, "held-out ct: PSNR in mask [dB]").lines
    assert (psnr.get_xdata().tolist(), psnr.get_ydata().tolist()) == ([10, 30], [21, 23])
    assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([20], [22])
    assert _panel(figure, "learning rate").get_yscale() == "log"
    bar = figures.allocation(history).axes[0].containers[0][0]
    (ct,) = _panel(figure, "negative log likelihood: ct").lines
    assert to_rgb(ct.get_color()) == to_rgb(psnr.get_color()) == to_rgb(bar.get_facecolor())


def test_curves_of_nothing(history):
    empty = {name: [] for name in history["curves"]} | {"nll": {}, "scores": {}}
    assert "No training step" in figures.curves(history | {"curves": empty}).texts[0].get_text()


def _case(
    mr=True,
    ct_true=True,
    ct_pred=True,
    labels_true=True,
    labels_pred=True,
    uncertainty=True,
    spacing=(2.0, 1.0),
    title="case",
    names=None,
):
    """What a report asks of `case_panel` for the paper's two tasks. Each plane: True for one made up, None for none."""
    plane = np.random.default_rng(0).normal(0, 30, (12, 16))
    given = {"mr": (mr, plane), "ct_true": (ct_true, plane), "ct_pred": (ct_pred, plane + 5)}
    given |= {
        name: (one, np.zeros(plane.shape, np.uint8)) for name, one in (("true", labels_true), ("pred", labels_pred))
    }
    found = {name: usual if one is True else one for name, (one, usual) in given.items()}
    ct, organs = ct_and_organs(names or {"background": 0, "left_femur": 1, "bladder": 2}).values()
    panels = [] if found["mr"] is None else [figures.mr_panel(found["mr"])]
    panels += ct.panels(None, found["ct_true"], found["ct_pred"])
    panels += organs.panels(panels[0], found["true"], found["pred"]) if panels else []
    if uncertainty is not None:
        panels.append(figures.uncertainty_panel(np.abs(plane), "ct", ct.uncertainty_unit))
    return {"panels": panels, "spacing": spacing, "title": title}


def test_radiological_orientation_on_the_page():
    """Columns of a RAS+ slice grow to the patient's right, which belongs on the viewer's left; the front is up."""
    mr = np.zeros((12, 16))
    mr[9:, 12:] = 100.0  # patient's right, front
    figure = figures.case_panel(**_case(mr=mr, ct_true=None, ct_pred=None, uncertainty=None))
    axes = _panel(figure, "MR")
    shown = _shown(figure, axes)
    height, width = shown.shape[0] // 5, shown.shape[1] // 5  # of a bright quarter
    assert shown[:height, :width].min() > 0.99
    assert shown[:height, -width:].max() < 0.01
    assert shown[-height:, :width].max() < 0.01
    marks = {text.get_text(): text.get_window_extent().x0 for text in axes.texts}
    assert marks["R"] < marks["L"]


def test_true_proportions():
    figure = figures.case_panel(**_case(spacing=(3.0, 0.5)))
    figure.draw_without_rendering()
    for title in ("MR", "CT", "organs"):
        box = _panel(figure, title).get_window_extent()
        assert box.height / box.width == pytest.approx(12 * 3.0 / (16 * 0.5), rel=1e-3)


def test_outlines_lie_around_their_organ():
    truth, prediction = np.zeros((2, 12, 16), np.uint8)
    truth[2:5, 1:4] = 1  # 3 x 3 pixels, near the patient's left and back
    prediction[2:5, 2:5] = 1
    prediction[11, 15] = 2  # one pixel in the corner, in the prediction alone
    figure = figures.case_panel(**_case(labels_true=truth, labels_pred=prediction))
    axes = _panel(figure, "organs")
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 16), (0, 24))  # the image fills the frame
    solid, *dashed = axes.collections
    # Drawn from the right: columns 1..3 of 16 lie 12 to 15 mm from the left edge; rows 2..4 at 2 mm lie 4 to 10 mm up.
    np.testing.assert_allclose(solid.get_paths()[0].get_extents().extents, [12, 4, 15, 10])
    np.testing.assert_allclose(dashed[0].get_paths()[0].get_extents().extents, [11, 4, 14, 10])
    np.testing.assert_allclose(dashed[1].get_paths()[0].get_extents().extents, [0, 22, 1, 24])
    assert solid.get_linestyle()[0][1] is None
    assert all(outline.get_linestyle()[0][1] for outline in dashed)
    assert to_rgb(solid.get_edgecolor()[0]) == to_rgb(dashed[0].get_edgecolor()[0])
    assert to_rgb(dashed[1].get_edgecolor()[0]) != to_rgb(dashed[0].get_edgecolor()[0])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["truth", "prediction", "Left femur", "Bladder"]


def test_difference_is_synthetic_minus_true_about_zero():
    true = np.zeros((12, 16), np.int16)
    pred = true - 250.0
    figure = figures.case_panel(**_case(ct_true=true, ct_pred=pred))
    (image,) = _panel(figure, "synthetic CT - CT").images
    assert image.get_clim() == (-300, 300)
    assert (np.asarray(image.get_array()) == -250).all()
    red, _, blue = image.cmap(image.norm(-250.0))[:3]
    assert blue > red  # too low is blue


def test_both_cts_share_a_scale():
    figure = figures.case_panel(**_case())
    assert (
        _panel(figure, "CT").images[0].get_clim() == _panel(figure, "synthetic CT").images[0].get_clim() == (-400, 1000)
    )


@pytest.mark.parametrize(
    ("absent", "panels"),
    [
        ([], ["MR", "CT", "synthetic CT", "synthetic CT - CT", "organs", "ct: SD over draws"]),
        (["ct_true"], ["MR", "synthetic CT", "organs", "ct: SD over draws"]),
        (["ct_pred", "uncertainty", "labels_true"], ["MR", "CT", "organs"]),
        (["ct_true", "ct_pred", "labels_true", "labels_pred", "uncertainty"], ["MR"]),
    ],
)
def test_panels_without_data_are_left_out(absent, panels):
    assert _titles(figures.case_panel(**_case(**dict.fromkeys(absent)))) == panels


def test_bad_slices_are_named():
    with pytest.raises(InputError, match="'case' has no image"):
        figures.case_panel([], (1.0, 1.0), "case")
    for wrong in (
        Panel("b", np.zeros((5, 16)), {}),
        Panel("b", np.zeros((12, 16)), {}, "", Contours(None, np.zeros((9, 9)), {})),
    ):
        with pytest.raises(InputError, match="differ in shape"):
            figures.case_panel([Panel("a", np.zeros((12, 16)), {}), wrong], (1.0, 1.0), "case")


def test_each_panel_has_its_own_unit():
    figure = figures.case_panel(**_case())
    units = {axes.get_title(): [child.get_title() for child in axes.child_axes] for axes in figure.axes}
    bars = ("CT", "synthetic CT", "synthetic CT - CT", "ct: SD over draws")
    assert {title: units[title] for title in bars} == {title: ["HU"] for title in bars}
    assert units["MR"] == units["organs"] == []


def test_two_label_maps_are_told_apart():
    """Of the same names: each has colours of its own, and the legend says which is which."""
    plane, labels = np.zeros((12, 16)), np.zeros((12, 16), np.uint8)
    labels[2:5, 1:4] = 1
    maps = [
        Panel(name, plane, {"cmap": "gray"}, "", Contours(labels, None, {"left": 1})) for name in ("organs", "vessels")
    ]
    figure = figures.case_panel(maps, (1.0, 1.0), "case")
    colours = [_panel(figure, name).collections[0].get_edgecolor()[0] for name in ("organs", "vessels")]
    assert to_rgb(colours[0]) != to_rgb(colours[1])
    texts = {text.get_text(): line.get_color() for text, line in _legend(figure)}
    assert list(texts) == ["truth", "Left (organs)", "Left (vessels)"]
    assert [to_rgb(texts[f"Left ({name})"]) for name in ("organs", "vessels")] == [to_rgb(one) for one in colours]


def _legend(figure):
    (legend,) = figure.legends
    return zip(legend.get_texts(), legend.get_lines(), strict=True)


def test_a_scatter_has_a_point_for_each_image_and_the_line_of_equals():
    true, predicted = np.array([20.0, 60.0, 35.0]), np.array([25.0, 50.0, 90.0])
    figure = figures.chart(Scatter("Age", "years", true, predicted))
    (axes,) = figure.axes
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), np.stack([true, predicted], 1))
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_xlim()[0] < 20
    assert axes.get_xlim()[1] > 90
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("true [years]", "predicted [years]", "Age")
    one = figures.chart(Scatter("Age", "", np.array([3.0]), np.array([3.0]))).axes[0]
    assert one.get_xlim()[0] < 3 < one.get_xlim()[1]
    assert one.get_xlabel() == "true"
    assert "No image" in figures.chart(Scatter("Age", "", np.empty(0), np.empty(0))).texts[0].get_text()


def test_a_confusion_matrix_has_the_true_classes_in_its_rows():
    counts = np.array([[8, 2, 0], [1, 1, 0], [0, 0, 0]])  # no image of the third class
    figure = figures.chart(Matrix("Gender", ("female", "$male$", "other"), counts))
    axes = figure.axes[0]
    found = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert found == {place: str(count) for place, count in np.ndenumerate(counts)}
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.2, 0], [0.5, 0.5, 0], [0, 0, 0]])
    figure.draw_without_rendering()
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["female", r"\$male\$", "other"]
    # The first row is on top, and each number on its own field.
    box = axes.texts[1].get_window_extent()
    inverse = axes.transData.inverted().transform(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
    np.testing.assert_allclose(inverse, [1, 0], atol=0.1)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_activation_maps_per_group():
    image = np.zeros((12, 16))
    first = np.zeros((6, 8))  # half the resolution of the image
    first[:, -1] = 1.0  # patient's right
    maps = {"shared": [], "ct": [("kernel 3", first), ("kernel 5", first)], "organs": [("kernel 1", first)]}
    figure = figures.activation_maps(image, maps, (2.0, 1.0))
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["ct", "shared", "organs"]
    assert _titles(figure) == ["input", "kernel 3", "kernel 5", "kernel 1"]
    empty = next(axes for axes in figure.axes if axes.get_ylabel() == "shared")
    assert [text.get_text() for text in empty.texts] == ["no kernel"]
    axes = _panel(figure, "kernel 3")
    figure.draw_without_rendering()
    assert axes.get_window_extent().height / axes.get_window_extent().width == pytest.approx(24 / 16, rel=1e-3)
    np.testing.assert_array_equal(np.asarray(axes.images[0].get_array())[:, 0], 1.0)  # on the viewer's left
    assert "no filter groups" in figures.activation_maps(image, {}, (1.0, 1.0)).texts[0].get_text()


def test_a_dollar_is_only_a_dollar(history):
    history["groups"] = ["shared", r"$\ct$", "org$ns"]
    history["curves"] |= {"nll": {}, "scores": {}}
    names = {"background": 0, r"$\organ$": 1}
    case = {"title": r"$\nonsense$", "names": names, "labels_true": np.ones((12, 16), np.uint8)}
    panel = figures.case_panel(**_case(ct_true=None, ct_pred=None, uncertainty=None, **case))
    for figure in (figures.allocation(history), panel):
        figure.draw_without_rendering()  # a formula that can't be read would raise here


def test_a_reader_s_own_settings_are_left_aside(history):
    """They may ask for a program or a font that isn't here."""
    plain = figures.to_data_uri(figures.entropy(history))
    with matplotlib.rc_context({"text.usetex": True, "font.family": "NoSuchFont", "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert figures.to_data_uri(figures.entropy(history)) == plain
        assert dict(matplotlib.rcParams) == before


def test_save_writes_all_or_nothing(tmp_path, history):
    figure = figures.entropy(history)
    figures.save(figure, tmp_path / "entropy.png")
    header, data = figures.to_data_uri(figure).split(",")
    assert header == "data:image/png;base64"
    for content in ((tmp_path / "entropy.png").read_bytes(), base64.b64decode(data, validate=True)):
        assert content.startswith(b"\x89PNG")
        assert content.endswith(b"IEND\xaeB`\x82")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="taken"):
        figures.save(figure, tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entropy.png", "taken"]
