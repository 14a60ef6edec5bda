"""Where the Triton kernels can run; imports no Triton."""

import os

import torch

# As Triton itself reads it.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def device_reason(device_type: str | None) -> str | None:
    """Why tensors of that device (None: any) cannot be used; None if they can."""
    if device_type == "cpu" or (device_type is None and not torch.cuda.is_available()):
        if INTERPRETED:
            return None
        need = "tensors on cpu need Triton's interpreter (TRITON_INTERPRET=1)"
        return need if torch.cuda.is_available() else f"there is no GPU; {need}"
    if device_type in (None, "cuda"):
        return "TRITON_INTERPRET is set: the interpreter takes CPU tensors" if INTERPRETED else None
    return f"there is no Triton kernel for {device_type}"
