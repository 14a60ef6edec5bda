"""δ and its derivative on the device, a pair of functions by name; the names are those of saml_kernels.activations.

``forward(z)`` is δ(z); ``backward(dv, v, z)`` is dv ∘ δ'(z), from the value v = δ(z) or from z, whichever
saml_kernels.activations says is kept. A stage's description holds the pair: ``STAGE.activation.forward(z)``.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import triton
import triton.language as tl

from saml_kernels.activations import ACTIVATIONS, check_names
from saml_kernels.backends.triton.kernels.values import several, value


@triton.jit
def hyperbolic_tangent(x):
    t = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def logistic(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def relu(z):
    # A NaN must survive, so the comparison decides what is zero.
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def relu_backward(dv, v, z):
    return tl.where(v <= 0, 0.0, dv)


@triton.jit
def leaky_relu(z):
    return tl.where(z > 0, z, 0.01 * z)


@triton.jit
def leaky_relu_backward(dv, v, z):
    return tl.where(v > 0, dv, 0.01 * dv)


@triton.jit
def gelu_tangent(z):
    # √(2/π) and the cubic coefficient of the tanh form.
    return hyperbolic_tangent(0.7978845608028654 * (z + 0.044715 * z * z * z))


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + gelu_tangent(z))


@triton.jit
def gelu_backward(dv, v, z):
    t = gelu_tangent(z)
    inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * z * z)
    return dv * (0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner)


@triton.jit
def silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def silu_backward(dv, v, z):
    s = logistic(z)
    # In this order: s (1 + z (1 − s)) takes eight registers more, which spill.
    return dv * (s + z * s * (1.0 - s))


@triton.jit
def tanh_backward(dv, v, z):
    return dv * (1.0 - v * v)


@triton.jit
def logistic_backward(dv, v, z):
    return dv * v * (1.0 - v)


@triton.jit
def identity(z):
    return z


@triton.jit
def identity_backward(dv, v, z):
    return dv


@dataclass(frozen=True)
class DeviceActivation:
    """δ on the device."""

    leaf: ClassVar[bool] = True

    name: str
    forward: Any
    backward: Any


DEVICE_ACTIVATIONS = {
    activation.name: activation
    for activation in (
        DeviceActivation("relu", relu, relu_backward),
        DeviceActivation("leaky_relu", leaky_relu, leaky_relu_backward),
        DeviceActivation("gelu", gelu, gelu_backward),
        DeviceActivation("silu", silu, silu_backward),
        DeviceActivation("tanh", hyperbolic_tangent, tanh_backward),
        DeviceActivation("identity", identity, identity_backward),
        DeviceActivation("sigmoid", logistic, logistic_backward),
    )
}
check_names("the activations of the Triton kernels", [*ACTIVATIONS, "sigmoid"], list(DEVICE_ACTIVATIONS))


@triton.jit
def activate(ACTIVATION: tl.constexpr, stage, z):
    """δ(z) of the stage. A branch and no choice, so that only one is computed."""
    if several(ACTIVATION):
        number = value(ACTIVATION.number, stage)
        for i in tl.static_range(len(ACTIVATION.choices)):
            if ACTIVATION.choices[i].name != "identity":
                if number == i:
                    z = ACTIVATION.choices[i].forward(z)
    else:
        z = ACTIVATION.forward(z)
    return z


@triton.jit
def activate_backward(ACTIVATION: tl.constexpr, stage, dv, v, z):
    """dv ∘ δ'(z) of the stage."""
    if several(ACTIVATION):
        number = value(ACTIVATION.number, stage)
        for i in tl.static_range(len(ACTIVATION.choices)):
            if ACTIVATION.choices[i].name != "identity":
                if number == i:
                    dv = ACTIVATION.choices[i].backward(dv, v, z)
    else:
        dv = ACTIVATION.backward(dv, v, z)
    return dv
