"""Rows grouped by scenario; layer 1 of all branches as one product; everything else through the own branch alone.

Layer 1 of all M branches reads the same rows, so its weights stand side by side as (K, M·d). After it a row needs its
own row of the table, its own gate and its own branch: one product per scenario over its consecutive rows. Foreign
streams are constants, so backward is the own branch's, written out in two autograd Functions. The alternative, layer 1
under no_grad and the own branch's share of it once more with a graph, was as fast at M = 8 and costs 1/M of layer 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peers.permutation import take_rows
from peers.scoring import clamped_norm, ratio_weights
from saml_kernels import TrunkParams


class Products(NamedTuple):
    """How matrix products are computed."""

    matmul: Callable[[Tensor, Tensor], Tensor]
    """(x (N, K), w (K, P)) -> x w."""
    linear: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x (N, K), w (K, P), b (P,)) -> x w + b."""
    linear_relu: Callable[[Tensor, Tensor, Tensor], Tensor]
    """relu(x w + b)."""


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """activation(x w + b). Inductor takes torch's operator with constant weights only: there it is wrapped."""
    if x.numel() == 0:  # a scenario without rows, which oneDNN refuses
        return x @ weight
    if torch.compiler.is_compiling():
        return _opaque_onednn(x, weight, bias, activation)
    return torch.ops.mkldnn._linear_pointwise(x, weight.t(), bias, activation, [], "")


@torch.library.custom_op("saml_benchmarks::onednn_linear", mutates_args=())
def _opaque_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight.t(), bias, activation, [], "")


@_opaque_onednn.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


ATEN = Products(torch.mm, lambda x, w, b: torch.addmm(b, x, w), lambda x, w, b: torch.addmm(b, x, w).relu_())
ONEDNN = Products(_onednn, _onednn, lambda x, w, b: _onednn(x, w, b, "relu"))


def trunk(
    x_local: Tensor, x_global: Tensor, scenario: Tensor, params: TrunkParams, *, products: Products = ATEN
) -> tuple[Tensor, Tensor]:
    """own (B, d_L), aux (B, a_L); see the package."""
    M = params.branch_weights[0].shape[0]
    t, permutation = torch.sort(scenario.long(), stable=True)
    sizes = torch.bincount(t, minlength=M).tolist()
    rows = torch.arange(t.shape[0], device=t.device)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = rows

    aux, own = take_rows(x_global, permutation, inverse), take_rows(x_local, permutation, inverse)
    for layer, (weight, bias) in enumerate(zip(params.branch_weights, params.branch_biases, strict=True)):
        aux_weight, aux_bias = params.aux_weights[layer], params.aux_biases[layer]
        aux = torch.relu(_GroupedLinear.apply(aux, aux_weight[None], aux_bias[None], [len(aux)], products))
        inputs = torch.cat([own, aux], dim=1)
        gate_weight, gate_bias = params.gate_weights[layer], params.gate_biases[layer]
        if gate_weight is None or gate_bias is None:
            own = torch.relu(_GroupedLinear.apply(inputs, weight, bias, sizes, products))
            continue
        streams, own = _EveryBranch.apply(inputs, weight, bias, rows, t, sizes, products)
        dots = torch.bmm(streams, own[:, :, None]).squeeze(2)
        cosine = dots / (clamped_norm(own)[:, None] * clamped_norm(streams))
        alpha = ratio_weights(cosine, t[:, None] == torch.arange(M, device=t.device))
        gate = torch.sigmoid(_GroupedLinear.apply(own, gate_weight, gate_bias, sizes, products))
        own = own + gate * torch.bmm(alpha[:, None], streams).squeeze(1)

    return take_rows(own, inverse, permutation), take_rows(aux, inverse, permutation)


class _GroupedLinear(torch.autograd.Function):
    """x W_t + b_t, rows (B, K) sorted by scenario with ``sizes`` rows each; W (M, K, N), b (M, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, sizes: list[int], products: Products) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes, ctx.products = sizes, products
        return _join(torch.cat, [products.linear(part, weight[k], bias[k]) for k, part in enumerate(x.split(sizes))])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (*_grouped_gradients(x, weight, gradient, ctx.sizes, ctx.products), None, None)


class _EveryBranch(torch.autograd.Function):
    """relu(x W_k + b_k) of all branches (B, M, d), constants, and of the own branch (B, d), with gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        rows: Tensor,
        t: Tensor,
        sizes: list[int],
        products: Products,
    ) -> tuple[Tensor, Tensor]:
        M, K, d = weight.shape
        side_by_side = weight.permute(1, 0, 2).reshape(K, M * d)
        streams = products.linear_relu(x, side_by_side, bias.reshape(M * d)).view(-1, M, d)
        own = streams[rows, t]
        ctx.save_for_backward(x, weight, own)
        ctx.sizes, ctx.products = sizes, products
        ctx.mark_non_differentiable(streams)
        return streams, own

    @staticmethod
    def backward(ctx: Any, _: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, own = ctx.saved_tensors
        gradients = _grouped_gradients(x, weight, gradient * (own > 0), ctx.sizes, ctx.products)
        return (*gradients, None, None, None, None)


def _grouped_gradients(
    x: Tensor, weight: Tensor, gradient: Tensor, sizes: list[int], products: Products
) -> tuple[Tensor, Tensor, Tensor]:
    """∂x, ∂W, ∂b of the grouped product from the gradient of its result."""
    groups = list(enumerate(zip(x.split(sizes), gradient.split(sizes), strict=True)))
    return (
        _join(torch.cat, [products.matmul(part_gradient, weight[k].t()) for k, (_, part_gradient) in groups]),
        _join(torch.stack, [products.matmul(part.t(), part_gradient) for _, (part, part_gradient) in groups]),
        _join(torch.stack, [part_gradient.sum(0) for _, (_, part_gradient) in groups]),
    )


def _join(join: Callable[[list[Tensor]], Tensor], parts: list[Tensor]) -> Tensor:
    """torch.cat or torch.stack, without the copy where there is one part only (the auxiliary network)."""
    if len(parts) > 1:
        return join(parts)
    return parts[0] if join is torch.cat else parts[0][None]
