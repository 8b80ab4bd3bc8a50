"""Streams: which arguments their parts refuse, and how they look in `print`."""

import re

import pytest
from torch import nn

from sfg_fast import StreamConv2d
from sfg_fast.layers.streams import StreamBlock
from sfg_fast.networks.parts import ResidualBlock

PARTS = {
    "StreamBlock": lambda norm: StreamBlock(3, ["p", "q"], norm=norm),
    "ResidualBlock": lambda norm: ResidualBlock(3, 1, False, norm),
    "StreamConv2d": lambda norm: StreamConv2d(3, 2, 1, norm=norm),
}


@pytest.mark.parametrize("norm", ["instance", ("group", {"num_groups": 1}), "none"], ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_norms_that_streams_do_not_have_are_refused(part, norm):
    message = f"norm={norm!r}: expected None or 'batch', because streams have no other normalisation"
    with pytest.raises(ValueError, match=re.escape(message)):
        PARTS[part](norm)


@pytest.mark.parametrize("part", PARTS)
def test_norms_that_streams_have(part):
    norms = {
        norm: [m for m in PARTS[part](norm).modules() if isinstance(m, nn.BatchNorm2d)] for norm in (None, "batch")
    }
    assert not norms[None]
    assert norms["batch"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "groups=3: expected groups=1, because each group reads all its channels"),
        (
            {"activation": "sigmoid"},
            "activation='sigmoid' is unknown, expected None, 'relu', 'leaky_relu', 'relu_pool' or a callable",
        ),
        ({"activation": nn.Sigmoid}, "activation is the class Sigmoid, expected an instance: Sigmoid()"),
    ],
    ids=str,
)
def test_arguments_that_a_stream_convolution_can_not_have(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        StreamConv2d(3, 6, 1, **options)


def test_print_tells_the_tasks_of_a_stream_convolution():
    layer = StreamConv2d(3, 6, 1, tasks=["p", "q"], activation="relu")
    assert repr(layer) == "StreamConv2d(3, 6, kernel_size=(1, 1), stride=(1, 1), tasks=('p', 'q'), activation=relu)"
