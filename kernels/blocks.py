"""Which blocks of a packed weight are read, and the geometry of a convolution: the arguments all kernels share."""

from typing import NamedTuple

from torch import Tensor


class Blocks(NamedTuple):
    """The block structure of a packed weight [K, C, ...]."""

    rows: Tensor  # int64 [groups_out + 1]: output group g owns rows[g]:rows[g+1]
    columns: Tensor  # int64 [groups_in + 1]: input group g owns columns[g]:columns[g+1]
    reads: Tensor  # bool [groups_out, groups_in]: does the output group read the input group?


class Geometry(NamedTuple):
    """Stride, zero padding and dilation, each (vertical, horizontal)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
