"""How PyTorch runs a call: exported, traced, under torch.func's transforms, on tensors without numbers."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

SCRIPT_REASON = 'TorchScript and ONNX have no fused operators: use torch.export, or trace it with backend="reference"'


def is_exporting() -> bool:
    """Whether torch.export traces the call."""
    return torch.compiler.is_exporting()


def is_traced() -> bool:
    """Whether torch.jit.trace, or ONNX's older exporter, writes the call down."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]  # imported there, not exported


def _is_for_onnx() -> bool:
    return bool(torch.onnx.is_in_onnx_export())


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _has_tangents() -> bool:
    return forward_ad._current_level >= 0


# torch.compile calls these while it traces, and traces again under another transform. By itself it takes the first for
# True before torch 2.9, the second, by which torch.onnx.export traces too, for False, and does not follow the others.
for _function in (is_exporting, _is_for_onnx, _is_transformed, _has_tangents):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions have no attributes for mypy


def transform_reason() -> str | None:
    """Why kernels cannot run here: a transform of torch.func, or forward-mode derivatives; None where there is none.

    Kernels have first derivatives backwards, and neither batching rules nor tangents.
    """
    if _is_transformed():
        return 'torch.func transforms (grad, vjp, jvp, vmap, ...) need backend="reference"'
    if _has_tangents():
        return 'forward-mode derivatives need backend="reference"'
    return None


def script_reason() -> str | None:
    """Why neither kernels nor "auto" run here: the call is traced for TorchScript or ONNX; None where it is not.

    They hold PyTorch's own operators only, and "auto" would write down the reference without a word.
    """
    if is_traced() or (is_exporting() and _is_for_onnx()):
        return SCRIPT_REASON
    return None


def holds_numbers(tensor: Tensor) -> bool:
    """Whether a program may read the tensor's values: not on the meta device, of fake tensors, inside vmap, traced."""
    if torch.compiler.is_dynamo_compiling():
        return not (_is_transformed() or _has_tangents())
    if tensor.device.type == "meta" or is_fake(tensor) or is_traced():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return True
