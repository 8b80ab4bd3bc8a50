"""The routed convolution, its gradient, and the gradient of the gates. `convolve.py` is the front door.

- convolve -> run (who does it, decided once) -> eager (autograd) or graph (operators) -> kernels/
- epilogue: what follows the convolution in an SFG layer
- gate_gradient: every formula for the gradient of the gates
"""

from ..kernels.spec import RoutedConv
from .convolve import Convolved, convolve, routed_conv

__all__ = ["Convolved", "RoutedConv", "convolve", "routed_conv"]
