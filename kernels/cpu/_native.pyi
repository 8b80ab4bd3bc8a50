"""The functions of bindings.cpp. Arrays are DLPack capsules: float32 or float64 alike in one call, contiguous, in the
layouts that `kernels/cpu/__init__.py` gives them. The caller makes the arrays that a function writes to, too."""

from collections.abc import Sequence
from typing import TypeAlias

Array: TypeAlias = object  # a DLPack capsule
Pair: TypeAlias = tuple[int, int]  # vertical, horizontal
Activation: TypeAlias = tuple[bool, bool, float]  # relu, pool, slope

def instruction_sets() -> list[str]: ...
def use(name: str) -> None: ...
def empty_float32(shape: Sequence[int]) -> Array: ...
def empty_float64(shape: Sequence[int]) -> Array: ...
def memory_held() -> int: ...
def sample(
    log_p: Array, noise: Array | None, assignment: Array, order: Array, offsets: Array, known: Array
) -> list[int]: ...
def forward(
    x: Array,
    weight: Array,
    bias: Array | None,
    residual: Array | None,
    relu: bool,
    y: Array,
    kept_product: Array | None,
    rows: Sequence[int],
    columns: Sequence[int],
    reads: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    threads: int,
    row_order: Array | None = None,
    column_order: Array | None = None,
    affine: Array | None = None,
) -> None: ...
def input_gradient(
    dy: Array,
    relu_output: Array | None,
    weight: Array,
    shortcut_dx: Array | None,
    shortcut_dundrawn: Array | None,
    dx: Array,
    dundrawn: Array | None,
    drawn_features: Array | None,
    undrawn: tuple[object, ...] | None,
    dz: Array | None,
    rows: Sequence[int],
    columns: Sequence[int],
    reads: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    threads: int,
    row_order: Array | None = None,
    column_order: Array | None = None,
) -> None: ...
def gate_gradient(undrawn: tuple[object, ...], dundrawn: Array, dz: Array, threads: int) -> None: ...
def weight_gradient(
    x: Array,
    dy: Array,
    relu_output: Array | None,
    dw: Array,
    db: Array | None,
    rows: Sequence[int],
    columns: Sequence[int],
    reads: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    threads: int,
    row_order: Array | None = None,
    column_order: Array | None = None,
) -> None: ...
def keep_statistics(
    mean: Array,
    var: Array,
    assignment: Array,
    count: int,
    momentum: float,
    running_mean: Array,
    running_var: Array,
    draws: Array,
    pooled_mean: Array,
    pooled_var: Array,
) -> None: ...
def normalise(
    u: Array,
    weight: Array,
    bias: Array,
    order: Array | None,
    residual: Array | None,
    eps: float,
    activation: Activation,
    y: Array | None,
    mean: Array,
    var: Array,
    threads: int,
    affine: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    rate: float = 0.0,
) -> None: ...
def normalise_gradient(
    dy: Array,
    u: Array,
    weight: Array,
    bias: Array,
    order: Array | None,
    mean: Array,
    var: Array,
    shortcut_gradient: Array | None,
    eps: float,
    activation: Activation,
    du: Array,
    dweight: Array,
    dbias: Array,
    threads: int,
    activated_again: Array | None = None,
) -> None: ...
