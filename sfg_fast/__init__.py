"""Multi-task CNNs with Stochastic Filter Groups (SFG): the channels a sampled grouping zeroes are never computed."""

from . import reference
from .backends import backend
from .features import SFGFeatures
from .gpu.gpu_check import gpu_check
from .groups import FilterGroups
from .layers.conv import SFGConv2d
from .networks.controls import assign, penalties, predict, recalibrate, sampling, set_estimator, set_temperature
from .networks.convert import convert
from .networks.freeze import freeze
from .networks.highresnet import SFGHighResNet
from .networks.transfer import transfer
from .networks.vgg import SFGVGG
from .show_config import show_config

__all__ = [
    "SFGVGG",
    "FilterGroups",
    "SFGConv2d",
    "SFGFeatures",
    "SFGHighResNet",
    "assign",
    "backend",
    "convert",
    "freeze",
    "gpu_check",
    "penalties",
    "predict",
    "recalibrate",
    "reference",
    "sampling",
    "set_estimator",
    "set_temperature",
    "show_config",
    "transfer",
]
