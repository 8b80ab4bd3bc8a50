"""The checks of the Triton kernels see what is wrong: here each fault is planted, in Triton's interpreter."""

import pytest
import torch

from sfg_fast.backends import available

if not available("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

from sfg_fast.kernels import triton as kernels

from sfg_fast.gpu import checks

CHECKS = checks.checks(torch.device("cpu"))
UNDRAWN = "float32 16->16 in 3 groups, undrawn, arrow, 3x3"
PACKED = "float32 16->16 in 3 groups, packed, arrow, 3x3"
NORM = "float32 normalisation of 16 channels"
OF_EACH_IMAGE = NORM + " of each image"
DRAW = "draw of 100 kernels"


@pytest.mark.parametrize("name", [PACKED, UNDRAWN, NORM, OF_EACH_IMAGE, DRAW])
def test_the_kernels_are_right(name):
    errors = CHECKS[name]()
    assert errors
    assert all(0 <= error < 2e-6 for error in errors.values())


def off(change):
    """A function whose results are changed: tensors, or tuples of tensors."""

    def planted(function):
        def wrong(*arguments, **options):
            found = function(*arguments, **options)
            return change(found) if isinstance(found, torch.Tensor) else tuple(map(change_tensor, found))

        def change_tensor(one):
            return change(one) if isinstance(one, torch.Tensor) and one.is_floating_point() else one

        return wrong

    return planted


SLIGHTLY = off(lambda t: t * 1.0001)
NOISY = off(lambda t: t * (1 + 1e-6 * torch.rand(())))


def without_slope(function):
    """The leaky ReLU as a plain one."""
    return lambda dy, u, norm, *rest: function(dy, u, norm._replace(activation="relu"), *rest)


def of_the_first_image(function):
    """All images have the scale and shift of the first one."""

    def wrong(formula, dundrawn):
        first = (None if values is None else values[:1] for values in (formula.scale, formula.shift))
        return function(formula._replace(**dict(zip(("scale", "shift"), first, strict=True))), dundrawn)

    return wrong


def of_the_batch(function):
    """All images have the statistics of the batch."""

    def wrong(u, norm, residual, **options):
        y, mean, var, affine = function(u, norm._replace(each_image=False), residual, **options)
        return y, mean.repeat(len(u), 1), var.repeat(len(u), 1), affine

    return wrong


@pytest.mark.parametrize(
    ("check", "function", "planted", "said"),
    [
        (PACKED, "_convolve", SLIGHTLY, "relative errors {'forward'"),
        (PACKED, "weight_gradient", SLIGHTLY, "relative errors {'dw'"),
        (UNDRAWN, "gate_gradient", SLIGHTLY, "relative errors {'gates'"),
        (NORM, "normalise", SLIGHTLY, "relative errors {'forward'"),
        (NORM, "normalise_gradient", SLIGHTLY, "relative errors {'dx'"),
        (OF_EACH_IMAGE, "normalise", of_the_batch, "relative errors {'forward'"),
        (OF_EACH_IMAGE, "normalise_gradient", without_slope, "relative errors {'dx'"),
        (UNDRAWN, "gate_gradient", of_the_first_image, "relative errors {'gates, each image'"),
        (PACKED, "_convolve", NOISY, "a second run gave other bits"),
        (NORM, "normalise", NOISY, "a second run gave other bits"),
        (DRAW, "normalise", lambda f: lambda u, *a, **o: f(u * 1.01, *a, **o), "relative errors"),
        (DRAW, "sample", lambda f: lambda p, noise: f(p, None), "the draw is not argmax"),
        (DRAW, "sample", lambda f: lambda *a: (f(*a)[0], f(*a)[1].flip(0), *f(*a)[2:]), "not sorted by group"),
    ],
)
def test_what_is_wrong_is_found(monkeypatch, check, function, planted, said):
    monkeypatch.setattr(kernels, function, planted(getattr(kernels, function)))
    with pytest.raises(checks.WrongResult, match=said.replace("{", r"\{")):
        CHECKS[check]()


@pytest.mark.parametrize(
    ("kernel", "check"),
    [
        ("rowwalk_kernel", PACKED.replace("float32", "float16")),
        ("convolve_kernel", PACKED),
        ("weight_gradient_kernel", PACKED),
        ("reduce_kernel", PACKED),
        ("gate_gradient_kernel", UNDRAWN),
        ("affine_kernel", NORM),
    ],
)
def test_what_a_kernel_leaves_out_is_found(monkeypatch, kernel, check):
    """New memory is NaN while a check runs."""
    launch, skipped = kernels._launch, getattr(kernels, kernel)
    monkeypatch.setattr(kernels, "_launch", lambda one, *a: None if one is skipped else launch(one, *a))
    with pytest.raises(checks.WrongResult):
        CHECKS[check]()


@pytest.mark.slow
def test_every_kernel_is_launched_by_the_checks_of_gpu_check(monkeypatch):
    """So `auto` takes none that was not looked at."""
    launched, launch = set(), kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda one, *a: (launched.add(one), launch(one, *a))[1])
    for name, check in checks.checks(torch.device("cpu"), (16,)).items():
        if not name.startswith("float32"):  # rowwalk is for half precision
            check()
    every = {value for name, value in vars(kernels).items() if name.endswith("_kernel")}
    assert launched == every


def test_settings_are_left_as_they_were():
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.conv.fp32_precision
    CHECKS[DRAW]()
    with checks.products("float32"):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        CHECKS[NORM]()
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.conv.fp32_precision)
