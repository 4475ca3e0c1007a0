"""Float64 that is float64 everywhere.

Model code rounds to float32 in places, whatever its dtype: norms, and the softmax of eager attention.  Two orders of
one sum, equal to 16 digits, then differ in the seventh wherever rounding falls the other way, and a tolerance would
have to let that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def whole_float64(dtype: str) -> Iterator[None]:
    """While the block runs, nothing rounds a float64 tensor to float32; does nothing for another ``model.dtype``.

    Torch's own functions are replaced and put back.  A function mode would be tidier, but none is active in the
    backward pass, where activations are recomputed.
    """
    if dtype != "fp64":
        yield
        return
    softmax = F.softmax
    # Inherited from a C++ class: set on Tensor they hide the originals, and deleting them uncovers those again.
    Tensor.to = _kept(Tensor.to)  # type: ignore[method-assign]
    Tensor.float = _float(Tensor.float)  # type: ignore[method-assign]
    F.softmax = _kept(softmax)  # type: ignore[assignment]
    try:
        yield
    finally:
        del Tensor.to, Tensor.float
        F.softmax = softmax


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with float64 wherever a float64 tensor is asked for in float32."""

    def wide(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype == torch.float64:
            args, kwargs = tuple(map(wide, args)), {name: wide(value) for name, value in kwargs.items()}
        return function(tensor, *args, **kwargs)

    return call


def _float(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return tensor if tensor.dtype == torch.float64 else function(tensor, *args, **kwargs)

    return call
