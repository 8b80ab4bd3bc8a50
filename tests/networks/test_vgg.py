"""`SFGVGG` under dense masking and on every backend, and that it learns tasks of different kinds."""

import pytest
import torch
import torch.nn.functional as F

from sfg_fast import SFGVGG, backend, parameter_groups, penalties, predict, recalibrate
from sfg_fast.networks.build import build
from sfg_fast.networks.controls import draws_from_constant_p
from sfg_fast.networks.methods import METHODS as ALL_METHODS
from tests.backends import FAST
from tests.oracle import assert_close

OUTPUTS = {"class": 3, "age": 1, "left": 2}
METHODS = [method for method in ALL_METHODS if method != "cross_stitch"]


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("norm", [None, "batch"])
def test_equals_itself_under_dense_masking(name, norm, float64):
    model, x = SFGVGG(2, OUTPUTS, width=2, norm=norm), torch.randn(3, 2, 34, 33)
    results = []
    for chosen in ("reference", name):
        torch.manual_seed(0)
        with backend(chosen):
            y = model(x)
        loss = sum(out.square().sum() for out in y.values())
        results.append([*y.values(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert [tuple(out.shape) for out in y.values()] == [(3, 3), (3, 1), (3, 2)]
    for index, (a, b) in enumerate(zip(*results, strict=True)):
        assert_close(b, a, 1e-9, what=f"{index}", scale=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_grouping(method):
    outputs = {"age": 1} if method == "one_task" else OUTPUTS
    model = SFGVGG(1, outputs, width=4, method=method)
    assert len(model.features) == 8  # VGG-11: eight convolutions and three fully connected layers, here one head a task
    groups = {tuple(layer.draw().assignment.unique().tolist()) for layer in model.features}
    expected = {"one_task": {(1,)}, "hard_sharing": {(0,)}, "constant_mask": {(0, 1, 2, 3)}, "even_split": {(1, 2, 3)}}
    assert method not in expected or groups == expected[method]
    learns = [layer.learns_grouping for layer in model.features]
    assert all(learns) if method == "sfg" else not any(learns)


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("tasks", [1, 3, 5])
def test_any_number_of_tasks_trains_and_predicts(tasks, method):
    if method == "one_task":
        tasks = 1
    outputs = {f"task{number}": number % 3 + 1 for number in range(tasks)}
    model = build("vgg", 2, outputs, method, width=6, init="mostly_shared")
    x, groups = torch.randn(3, 2, 36, 33), parameter_groups(model, 0.1, lr=0.01, logits_factor=10)
    loss = sum(y.square().mean() for y in model(x).values()) - penalties(model)[1]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW(groups).step()
    recalibrate(model, [x], drawn=draws_from_constant_p(model))
    found = predict(model, x, draws=2 if draws_from_constant_p(model) else 0)
    assert {task: tuple(one.mean.shape) for task, one in found.items()} == {t: (3, n) for t, n in outputs.items()}
    assert all(one.mean.isfinite().all() for one in found.values())


def test_learns_a_class_and_a_number():
    """Where a bright square is, and how bright, told from the same image."""
    torch.manual_seed(0)
    x = 0.1 * torch.randn(32, 1, 32, 32)
    left, level = torch.arange(32) % 2, torch.linspace(1, 2, 32)
    for image, side, value in zip(x, left, level, strict=True):
        image[0, 8:24, 16 * side : 16 * side + 16] += value
    # So narrow a network learns little while most kernels change their group at every step: mostly shared ones don't.
    model = SFGVGG(1, {"side": 2, "level": 1}, width=4, init=[0.96, 0.02, 0.02])
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        y = model(x)
        loss = F.cross_entropy(y["side"], left) + (y["level"][:, 0] - level).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert F.cross_entropy(y["side"], left) < 0.1
    assert (y["level"][:, 0] - level).square().mean() < 0.3 * level.var()


def test_a_small_image_is_refused():
    with pytest.raises(ValueError, match=r"the image has size \(31, 40\), expected at least \(32, 32\)"):
        SFGVGG(1, {"a": 1}, width=2)(torch.zeros(1, 1, 31, 40))


def test_a_width_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"width=\[16, 32, 64\]: expected a number"):
        SFGVGG(1, {"a": 1}, width=[16, 32, 64])
