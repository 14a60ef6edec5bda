"""Autocast as every function follows it: tensors of a floating type are cast first, as for a matrix product."""

from contextlib import AbstractContextManager, nullcontext
from typing import overload

import torch
from torch import Tensor

# torch.compile of torch 2.8 cannot ask inside a graph.
DEVICE_TYPES = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu")))
"""Types of devices that have an autocast."""


def device_type(tensor: Tensor) -> str:
    """Of the device whose autocast counts; what is no tensor is refused by the checks that follow."""
    name = tensor.device.type if isinstance(tensor, Tensor) else "cpu"
    return name if name in DEVICE_TYPES else "cpu"


def is_on(device_type: str) -> bool:
    """Whether autocast is enabled for this type of device."""
    return bool(torch.is_autocast_enabled(device_type))


def off(device_type: str) -> AbstractContextManager[None]:
    """A block without autocast for this type of device. Where it is off anyhow there is nothing to switch."""
    return torch.autocast(device_type, enabled=False) if is_on(device_type) else nullcontext()


@overload
def cast(tensor: Tensor, device_type: str) -> Tensor: ...
@overload
def cast(tensor: Tensor | None, device_type: str) -> Tensor | None: ...
def cast(tensor: Tensor | None, device_type: str) -> Tensor | None:
    """float32, float16 and bfloat16 to the autocast type; everything else as it is."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))
