"""The trunk's backward, through the own branch only: input gradients layer by layer, then every weight's gradient.

Launches do not depend on B or M. With L layers and U mutual units: per layer δ' and the input gradient of the own
branch, and of the auxiliary network; per unit the own row's backward and the gate's product; one launch a weight:

    4 L + 2 U for the inputs (one less where x_global needs no gradient) and 2 L + U for the weights
    2 L and L without auxiliary network

Nothing adds atomically: every element has one writer, and parts of a long sum are added in order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from saml_kernels.backends.triton import configs, mutual
from saml_kernels.backends.triton.forward import NEEDS_ARGUMENT, recomputed_streams, unsorted
from saml_kernels.backends.triton.functions import IDENTITY, activate_backward
from saml_kernels.backends.triton.launching import distance, dot_precision, launch
from saml_kernels.backends.triton.product import Factor, product


@triton.jit(do_not_specialize=["elements"])
def activation_backward_kernel(
    dv,
    dv_row,
    more,
    more_row,
    v,
    z,
    dz,
    elements,
    N: tl.constexpr,
    HAS_MORE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """dz = (dv [+ more]) ∘ δ'."""
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = i < elements
    row, column = i // N, i % N
    gradient = tl.load(dv + row * dv_row + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_MORE:
        gradient += tl.load(more + row * more_row + column, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(v + i, mask=mask, other=0.0).to(tl.float32)
    argument = tl.load(z + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(dz + i, activate_backward(gradient, value, argument, ACTIVATION), mask=mask)


@triton.jit(do_not_specialize=["rows", "second"])
def weight_gradient_kernel(
    a,
    a_row,
    a_branch,
    second,
    second_row,
    dz,
    dw,
    db,
    offsets,
    rows,
    M: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    N: tl.constexpr,
    GROUPED: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of dW_k = Σ [A1 ; A2]ᵀ dz over a part of scenario k's rows, in ascending order; the bias' gradient too."""
    column_tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    k_tile = tl.program_id(0) // column_tiles
    k = k_tile * ROWS + tl.arange(0, ROWS)
    n = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    branch = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    if GROUPED:
        start = tl.load(offsets + branch)
        stop = tl.load(offsets + branch + 1)
    else:
        start = tl.program_id(1).to(tl.int64) * 0
        stop = start + rows
    length = ((stop - start + SPLITS - 1) // SPLITS + DEPTH - 1) // DEPTH * DEPTH
    begin = start + part * length
    end = tl.minimum(stop, begin + length)

    a += branch * a_branch
    second -= branch * a_branch
    of_first = k < K1
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias = tl.zeros((COLUMNS,), tl.float32)
    for row0 in range(begin, end, DEPTH):
        row = row0 + tl.arange(0, DEPTH)
        live = row < end
        place = tl.where(
            of_first[None, :],
            (row * a_row)[:, None] + k[None, :],
            second + (row * second_row)[:, None] + (k - K1)[None, :],
        )
        a_tile = tl.load(a + place, mask=live[:, None] & (k < K1 + K2)[None, :], other=0.0)
        dz_tile = tl.load(dz + (row * N)[:, None] + n[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(tl.trans(a_tile), dz_tile, total, input_precision=PRECISION)
        bias += tl.sum(dz_tile.to(tl.float32), 0)

    slot = part.to(tl.int64) * M + branch
    place = (slot * (K1 + K2) + k.to(tl.int64))[:, None] * N + n[None, :]
    tl.store(dw + place, total, mask=(k < K1 + K2)[:, None] & (n < N)[None, :])
    if k_tile == 0:
        tl.store(db + slot * N + n, bias, mask=n < N)


def weight_gradient(
    first: Factor, second: Factor | None, dz: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, *, grouped: bool
) -> tuple[Tensor, Tensor]:
    """Gradients like ``weight`` and ``bias``; ``grouped``: of scenario k from its rows, else from all rows."""
    k, n = weight.shape[-2:]
    branches = weight.shape[0] if grouped else 1
    splits = configs.splits(dz.shape[0])
    config = configs.weight_gradient(dz.dtype)
    if splits == 1:
        dw, db = torch.empty_like(weight), torch.empty_like(bias)
    else:
        dw = weight.new_empty((splits, *weight.shape), dtype=torch.float32)
        db = bias.new_empty((splits, *bias.shape), dtype=torch.float32)
    if dz.shape[0] == 0:
        return torch.zeros_like(weight), torch.zeros_like(bias)
    launch(
        weight_gradient_kernel,
        (max(1, triton.cdiv(k, config.rows)) * triton.cdiv(n, config.columns), branches, splits),
        first.tensor,
        first.row,
        first.branch,
        0 if second is None else distance(first.tensor, second.tensor),
        0 if second is None else second.row,
        dz,
        dw,
        db,
        offsets,
        dz.shape[0],
        M=branches,
        K1=first.width,
        K2=0 if second is None else second.width,
        N=n,
        GROUPED=grouped,
        SPLITS=splits,
        PRECISION=dot_precision(dz.dtype),
        ROWS=config.rows,
        COLUMNS=config.columns,
        DEPTH=config.depth,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return (dw, db) if splits == 1 else (dw.sum(0).to(weight.dtype), db.sum(0).to(bias.dtype))


def _activation_backward(
    dv: Tensor, more: Tensor | None, value: Tensor, argument: Tensor | None, activation: int
) -> Tensor:
    """dv and more (B, d) of any row stride; value and argument (B, d)."""
    dz = torch.empty_like(value)
    launch(
        activation_backward_kernel,
        (triton.cdiv(dz.numel(), configs.ELEMENTWISE.elements),),
        dv,
        dv.stride(0),
        dv if more is None else more,
        0 if more is None else more.stride(0),
        value,
        value if argument is None else argument,
        dz,
        dz.numel(),
        N=dz.shape[1],
        HAS_MORE=more is not None,
        ACTIVATION=activation,
        ELEMENTS=configs.ELEMENTWISE.elements,
        num_warps=configs.ELEMENTWISE.warps,
    )
    return dz


@dataclass
class _Layer:
    """What forward kept of a layer."""

    own: Tensor
    own_argument: Tensor | None = None
    mutual: Tensor | None = None
    aux: Tensor | None = None
    aux_argument: Tensor | None = None
    streams: Tensor | None = None
    gate: Tensor | None = None


def _layers(
    kept: Iterator[Tensor], mutual_layers: Sequence[int], activations: Sequence[int], auxiliary: bool, recompute: bool
) -> Iterator[_Layer]:
    for layer, activation in enumerate(activations):
        argument, unit = activation in NEEDS_ARGUMENT, layer in mutual_layers
        wanted = {
            "own": True,
            "own_argument": argument,
            "mutual": unit,
            "aux": auxiliary,
            "aux_argument": auxiliary and argument,
            "streams": unit and not recompute,
            "gate": unit,
        }
        yield _Layer(**{name: next(kept) for name, present in wanted.items() if present})


def trunk_backward(
    grad_own: Tensor,
    grad_aux: Tensor,
    scores: Sequence[Tensor],
    kept: Sequence[Tensor],
    x_local: Tensor,
    x_global: Tensor,
    permutation: Tensor,
    offsets: Tensor,
    branch_weights: Sequence[Tensor],
    branch_biases: Sequence[Tensor],
    aux_weights: Sequence[Tensor],
    aux_biases: Sequence[Tensor],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
    mutual_layers: Sequence[int],
    activations: Sequence[int],
    score: int,
    temperature: float,
    own_bfloat16: bool,
    foreign_bfloat16: bool,
    recompute: bool,
    need_local: bool,
    need_global: bool,
) -> tuple[Tensor | list[Tensor], ...]:
    """As the operator trunk_backward of csrc/ops.cpp."""
    auxiliary = bool(aux_weights)
    layers = list(_layers(iter(kept), mutual_layers, activations, auxiliary, recompute))
    # The own branch's input of every layer.
    inputs = [x_local] + [layer.own if layer.mutual is None else layer.mutual for layer in layers[:-1]]
    if recompute and mutual_layers:
        again = recomputed_streams(
            x_local,
            offsets,
            branch_weights,
            branch_biases,
            gate_weights,
            gate_biases,
            mutual_layers,
            activations,
            score,
            temperature,
            foreign_bfloat16 and not own_bfloat16,
            [layer.aux for layer in layers if layer.aux is not None],
            inputs,
            [layer.mutual for layer in layers if layer.mutual is not None],
        )
        for index, streams in zip(mutual_layers, again, strict=True):
            layers[index].streams = streams

    names = ("branch_weights", "branch_biases", "aux_weights", "aux_biases", "gate_weights", "gate_biases")
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}

    def add(kind: str, gradient: tuple[Tensor, Tensor]) -> None:
        for name, tensor in zip((f"{kind}_weights", f"{kind}_biases"), gradient, strict=True):
            gradients[name].insert(0, tensor)

    d_own = grad_own.index_select(0, permutation)
    d_aux = grad_aux.index_select(0, permutation)
    rows = x_local.shape[0]
    for index in reversed(range(len(layers))):
        layer, weight = layers[index], branch_weights[index]
        if layer.streams is not None and layer.gate is not None:
            unit = list(mutual_layers).index(index)
            d_value = torch.empty_like(layer.own, dtype=torch.float32)
            d_gate = torch.empty_like(layer.gate)
            mutual.own_row_backward(
                layer.streams, layer.gate, scores[unit], offsets, score, temperature, d_own, d_value, d_gate
            )
            gate_weight = gate_weights[unit]
            product(
                Factor.shared(d_gate),
                None,
                gate_weight,
                None,
                d_value,
                offsets,
                IDENTITY.value,
                own=True,
                accumulate=True,
                transposed=True,
            )
            add(
                "gate",
                weight_gradient(
                    Factor.shared(layer.own), None, d_gate, gate_weight, gate_biases[unit], offsets, grouped=True
                ),
            )
            d_own = d_value
        dz = _activation_backward(d_own, None, layer.own, layer.own_argument, activations[index])
        source = inputs[index]
        own_input = Factor.by_branch(source) if source.dim() == 3 else Factor.shared(source)
        second = None if layer.aux is None else Factor.shared(layer.aux)
        add("branch", weight_gradient(own_input, second, dz, weight, branch_biases[index], offsets, grouped=True))

        # Sums of gradients stay in float32; only a product's factors are rounded.
        d_in = dz.new_empty(rows, weight.shape[1], dtype=torch.float32)
        product(Factor.shared(dz), None, weight, None, d_in, offsets, IDENTITY.value, own=True, transposed=True)
        d_own = d_in[:, : own_input.width]
        if layer.aux is None:
            continue
        dz_aux = _activation_backward(
            d_aux, d_in[:, own_input.width :], layer.aux, layer.aux_argument, activations[index]
        )
        aux_weight = aux_weights[index]
        aux_input = x_global if index == 0 else layers[index - 1].aux
        assert aux_input is not None
        add(
            "aux",
            weight_gradient(
                Factor.shared(aux_input), None, dz_aux, aux_weight, aux_biases[index], offsets, grouped=False
            ),
        )
        if index > 0 or need_global:
            d_aux = dz.new_empty(rows, aux_weight.shape[0], dtype=torch.float32)
            product(
                Factor.shared(dz_aux),
                None,
                aux_weight,
                None,
                d_aux,
                offsets,
                IDENTITY.value,
                own=False,
                transposed=True,
            )

    local = x_local.new_empty(0)
    if need_local and x_local.dim() == 2:
        local = unsorted(d_own, permutation).to(x_local.dtype)
    elif need_local:
        local = torch.zeros_like(x_local)
        row = torch.arange(rows, device=x_local.device)
        local[permutation, torch.searchsorted(offsets[1:], row, right=True)] = d_own.to(x_local.dtype)
    glob = x_global.new_empty(0)
    if need_global:
        glob = unsorted(d_aux, permutation).to(x_global.dtype) if auxiliary else torch.zeros_like(x_global)
    return local, glob, *gradients.values()


def mutual_backward(
    gradient: Tensor,
    scores: Tensor,
    own: Tensor,
    gate: Tensor,
    streams: Tensor,
    permutation: Tensor,
    offsets: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score: int,
    temperature: float,
    bfloat16: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operator mutual_backward of csrc/ops.cpp: three launches."""
    d_own, d_gate = torch.empty_like(own, dtype=torch.float32), torch.empty_like(gate)
    d_mutual = gradient.index_select(0, permutation)
    mutual.own_row_backward(streams, gate, scores, offsets, score, temperature, d_mutual, d_own, d_gate)
    product(
        Factor.shared(d_gate),
        None,
        gate_weight,
        None,
        d_own,
        offsets,
        IDENTITY.value,
        own=True,
        accumulate=True,
        transposed=True,
    )
    weight, bias = weight_gradient(Factor.shared(own), None, d_gate, gate_weight, gate_bias, offsets, grouped=True)
    d_streams = torch.zeros_like(streams)
    row = torch.arange(len(permutation), device=streams.device)
    d_streams[permutation, torch.searchsorted(offsets[1:], row, right=True)] = d_own.to(streams.dtype)
    return d_streams, weight, bias
