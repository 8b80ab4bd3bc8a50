"""Multi-task CNNs with Stochastic Filter Groups (SFG): the channels a sampled grouping zeroes are never computed.

Importing the package imports nothing else; torch comes with the first of the names that is looked at. (So the command
line can answer Ctrl-C from its first moment on.)
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import reference
    from .backends import backend
    from .configuration import show_config
    from .features import SFGFeatures
    from .gpu.gpu_check import gpu_check
    from .groups import FilterGroups
    from .layers.conv import SFGConv2d, SFGConv3d, SFGConvTranspose2d, SFGConvTranspose3d
    from .layers.stream_conv import StreamConv2d
    from .networks.controls import (
        assign,
        parameter_groups,
        penalties,
        pool_gradients,
        predict,
        recalibrate,
        sampling,
        set_estimator,
        set_explore,
        set_noise_on,
        set_temperature,
    )
    from .networks.convert import convert
    from .networks.freeze import freeze
    from .networks.highresnet import SFGHighResNet
    from .networks.transfer import transfer
    from .networks.unet import SFGUNet
    from .networks.vgg import SFGVGG

# Where each name is. A new one stands here, above for mypy and editors, and in `__all__`.
_MODULES = {
    "SFGVGG": "networks.vgg",
    "FilterGroups": "groups",
    "SFGConv2d": "layers.conv",
    "SFGConv3d": "layers.conv",
    "SFGConvTranspose2d": "layers.conv",
    "SFGConvTranspose3d": "layers.conv",
    "SFGFeatures": "features",
    "SFGHighResNet": "networks.highresnet",
    "SFGUNet": "networks.unet",
    "StreamConv2d": "layers.stream_conv",
    "assign": "networks.controls",
    "backend": "backends",
    "convert": "networks.convert",
    "freeze": "networks.freeze",
    "gpu_check": "gpu.gpu_check",
    "parameter_groups": "networks.controls",
    "penalties": "networks.controls",
    "pool_gradients": "networks.controls",
    "predict": "networks.controls",
    "recalibrate": "networks.controls",
    "sampling": "networks.controls",
    "set_estimator": "networks.controls",
    "set_explore": "networks.controls",
    "set_noise_on": "networks.controls",
    "set_temperature": "networks.controls",
    "show_config": "configuration",
    "transfer": "networks.transfer",
}

__all__ = [
    "SFGVGG",
    "FilterGroups",
    "SFGConv2d",
    "SFGConv3d",
    "SFGConvTranspose2d",
    "SFGConvTranspose3d",
    "SFGFeatures",
    "SFGHighResNet",
    "SFGUNet",
    "StreamConv2d",
    "assign",
    "backend",
    "convert",
    "freeze",
    "gpu_check",
    "parameter_groups",
    "penalties",
    "pool_gradients",
    "predict",
    "recalibrate",
    "reference",
    "sampling",
    "set_estimator",
    "set_explore",
    "set_noise_on",
    "set_temperature",
    "show_config",
    "transfer",
]


def __getattr__(name: str) -> Any:
    """One of the names above, all of which are there from then on; or a module of the package, such as `reference`."""
    folders = {module.partition(".")[0] for module in _MODULES.values() if "." in module}
    if name in _MODULES or name in folders:
        modules = {module: importlib.import_module(f".{module}", __name__) for module in _MODULES.values()}
        globals().update({public: getattr(modules[module], public) for public, module in _MODULES.items()})
        return globals()[name]
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
