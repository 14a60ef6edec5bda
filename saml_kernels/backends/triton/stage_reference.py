"""Every kind of stage in plain PyTorch, on the tensors that its kernel gets: what a stage computes, alone.

    run_reference(stage, tensors, batch)

writes the stage's results into ``tensors``. Sorted rows, as the kernels have them; sums in the tensors' type, at least
float32. Tests run every stage of every program so, beside its kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saml_kernels.activations import ACTIVATIONS
from saml_kernels.backends.triton.stages import (
    Factor,
    InputGradient,
    Layer,
    MutualBackward,
    MutualOwnRow,
    MutualTable,
    QuantizedLayer,
    QuantizeRows,
    Rows,
    Stage,
    Weight,
    WeightGradient,
)
from saml_kernels.reference import DEGENERATE_SUM, NORM_EPSILON, round_to

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """A batch's rows by scenario."""

    permutation: Tensor
    """(B,): where each sorted row stands in the caller's order."""
    scenario: Tensor
    """(B,): scenarios of the sorted rows."""
    temperature: float


def run_reference(stage: Stage, tensors: Tensors, batch: Batch) -> None:
    """What the stage's kernel does.

    Raises:
        KeyError: ``tensors`` lacks one that the stage names.
    """
    _KINDS[type(stage)](stage, tensors, batch)


def _rows(rows: Rows, tensors: Tensors, batch: Batch, branch: Tensor) -> Tensor:
    """(B, width) of each row's ``branch``, sorted."""
    assert rows.tensor is not None
    found = tensors[rows.tensor]
    found = found[batch.permutation] if rows.gathered else found
    if rows.branch_stride:
        found = found.view(len(found), -1, rows.branch_stride)[torch.arange(len(found)), branch]
    return found.to(_computing(found))


def _store(rows: Rows, value: Tensor, tensors: Tensors, batch: Batch, branch: Tensor, where: Tensor) -> None:
    """(B, width) into the entries of each row's ``branch``, of the sorted rows ``where``."""
    assert rows.tensor is not None
    place = (batch.permutation if rows.gathered else torch.arange(len(where)))[where]
    target = tensors[rows.tensor]
    if rows.branch_stride:
        target.view(len(target), -1, rows.branch_stride)[place, branch[where]] = value[where].to(target.dtype)
    else:
        target[place] = value[where].to(target.dtype)


def _computing(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _weights(weight: Weight, k: int, n: int, tensors: Tensors, branch: Tensor, transposed: bool) -> Tensor:
    """(B, k, n), the lines that a factor reads of each row's branch; ``transposed``: of Wᵀ."""
    assert weight.tensor is not None
    assert weight.start is not None
    flat = tensors[weight.tensor].reshape(-1, weight.branch_stride or tensors[weight.tensor].numel())
    lines, width = (n, k) if transposed else (k, n)
    matrices = flat[:, weight.start : weight.start + lines * width].view(len(flat), lines, width)
    chosen = matrices[branch if weight.branch_stride else torch.zeros_like(branch)]
    return (chosen.mT if transposed else chosen).to(_computing(chosen))


def _product(factors: tuple[Factor, ...], n: int, tensors: Tensors, batch: Batch, branch: Tensor, back: bool) -> Any:
    """[A1 ; A2] W, or Wᵀ."""
    total: Any = 0.0
    for factor in factors:
        if factor.k > 0:
            rows = _rows(factor.rows, tensors, batch, branch)[:, : factor.k]
            total = total + (rows[:, None] @ _weights(factor.weight, factor.k, n, tensors, branch, back)).squeeze(1)
    return total


def _delta(name: str, z: Tensor) -> Tensor:
    return torch.sigmoid(z) if name == "sigmoid" else ACTIVATIONS[name].function(z)


def _branches(stage: Stage, batch: Batch) -> list[Tensor]:
    """The branch of every row, for every part that the stage has."""
    if stage.own:
        return [batch.scenario]
    return [torch.full_like(batch.scenario, branch) for branch in range(stage.branches or 1)]


def _layer(stage: Layer, tensors: Tensors, batch: Batch) -> None:
    for branch in _branches(stage, batch):
        bias = tensors[str(stage.bias)].view(-1, stage.n)[branch]
        z = bias + _product((stage.first, stage.second), stage.n, tensors, batch, branch, False)
        v = _delta(stage.activation, z)
        everywhere = torch.ones_like(branch, dtype=torch.bool)
        own = everywhere if stage.every_row_is_own else branch == batch.scenario
        out = v * stage.gate_scale * _rows(stage.gated, tensors, batch, branch) if stage.gated.present else v
        for rows, value, where in ((stage.preact, z, own), (stage.saved, v, own), (stage.out, out, everywhere)):
            if rows.present:
                _store(rows, value, tensors, batch, branch, where)


def _input_gradient(stage: InputGradient, tensors: Tensors, batch: Batch) -> None:
    (branch,) = _branches(stage, batch)
    dv = _product((stage.first, stage.second), stage.n, tensors, batch, branch, True)
    if stage.addend.present:
        dv = dv + _rows(stage.addend, tensors, batch, branch)
    saved = _rows(stage.saved, tensors, batch, branch) if stage.saved.present else dv
    if stage.gated.present:
        dv = stage.gate_scale * dv
        _store(stage.d_gated, dv * saved, tensors, batch, branch, torch.ones_like(branch, dtype=torch.bool))
        dv = dv * _rows(stage.gated, tensors, batch, branch)
    dz = dv * _derivative(stage, saved, tensors, batch, branch)
    _store(stage.out, dz, tensors, batch, branch, torch.ones_like(branch, dtype=torch.bool))


def _derivative(stage: InputGradient, v: Tensor, tensors: Tensors, batch: Batch, branch: Tensor) -> Tensor:
    """δ' from z where it is kept, else from v = δ(z)."""
    if stage.preact.present:
        z = _rows(stage.preact, tensors, batch, branch).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(_delta(stage.activation, z).sum(), z)
        return slope
    one = torch.ones_like(v)
    slopes = {
        "relu": torch.where(v <= 0, 0.0, one),
        "leaky_relu": torch.where(v > 0, 1.0, 0.01),
        "tanh": 1 - v * v,
        "identity": one,
    }
    slopes["sigmoid"] = v * (1 - v)
    return slopes[stage.activation]


def _quantize_rows(stage: QuantizeRows, tensors: Tensors, batch: Batch) -> None:
    for view in range(stage.views):
        branch = torch.full_like(batch.scenario, view)
        parts = [_rows(rows, tensors, batch, branch) for rows in (stage.first, stage.second) if rows.present]
        x = torch.cat(parts, 1)
        quantized, target = tensors[str(stage.quantized)], tensors[str(stage.quantized)][:, view]
        target.zero_()
        if stage.largest:
            target[:, : x.shape[1]], scale = round_to(x, quantized.dtype, dim=1)
            tensors[str(stage.scale)][:, view] = scale.squeeze(1)
        else:
            target[:, : x.shape[1]] = x.to(quantized.dtype)


def _quantized_layer(stage: QuantizedLayer, tensors: Tensors, batch: Batch) -> None:
    rows, scale = tensors[str(stage.rows.tensor)], tensors[f"{stage.rows.tensor}_scale"]
    weight, weight_scale = tensors[str(stage.weight)], tensors[f"{stage.weight}_scale"]
    for branch in _branches(stage, batch):
        k = int(branch[0]) if len(branch) else 0
        view = k if stage.rows.branch_stride else 0
        z = rows[:, view].float() @ weight[k].float().T
        if stage.scaled:
            z = z * scale[:, view, None] * weight_scale[k]
        v = _delta(stage.activation, z + tensors[str(stage.bias)].view(-1, stage.n)[k])
        _store(stage.out, v, tensors, batch, branch, branch != batch.scenario)


def _streams(stage: MutualOwnRow | MutualTable | MutualBackward, tensors: Tensors, batch: Batch) -> Tensor:
    v = tensors[str(stage.streams.tensor)]
    v = v[batch.permutation] if stage.streams.gathered else v
    return v.view(len(v), stage.num_scenarios, stage.d).to(_computing(v))


def _alpha(v: Tensor, score: str, temperature: float) -> tuple[Tensor, Tensor]:
    """c and α (B, M, M), 0 on the diagonal of α."""
    normed = v / v.norm(dim=2, keepdim=True).clamp_min(NORM_EPSILON)
    c = normed @ normed.mT
    own = torch.eye(v.shape[1], dtype=torch.bool)
    total = c.masked_fill(own, 0.0).sum(2, keepdim=True)
    degenerate = total.abs() < DEGENERATE_SUM
    ratio = torch.where(degenerate, 0.0, c / torch.where(degenerate, 1.0, total))
    argument = (ratio if score == "ratio" else c / temperature).masked_fill(own, float("-inf"))
    return c, torch.nan_to_num(torch.softmax(argument, 2))


def _mutual_own_row(stage: MutualOwnRow, tensors: Tensors, batch: Batch) -> None:
    v, t, n = _streams(stage, tensors, batch), batch.scenario, torch.arange(len(batch.scenario))
    weight = _alpha(v, stage.score, batch.temperature)[1][n, t]
    tensors[str(stage.alpha)][batch.permutation] = weight
    mutual = v[n, t] + tensors[str(stage.gate)] * (weight[:, None] @ v).squeeze(1)
    _store(stage.mutual, mutual, tensors, batch, t, torch.ones_like(t, dtype=torch.bool))


def _mutual_table(stage: MutualTable, tensors: Tensors, batch: Batch) -> None:
    v, t, n = _streams(stage, tensors, batch), batch.scenario, torch.arange(len(batch.scenario))
    weight = _alpha(v, stage.score, batch.temperature)[1]
    tensors[str(stage.alpha)][batch.permutation] = weight[n, t]
    mixed = v + tensors[str(stage.gates)].view(len(v), stage.num_scenarios, -1) * (weight @ v)
    tensors[str(stage.mixed)].copy_(mixed)
    if stage.save:
        tensors[str(stage.mutual)].copy_(mixed[n, t])


def _mutual_backward(stage: MutualBackward, tensors: Tensors, batch: Batch) -> None:
    """docs/computation.md, backward of the mutual unit: G = dM ∘ g, p_j = ⟨G, V_j⟩, dc_j, dV_t."""
    v, t, n = _streams(stage, tensors, batch), batch.scenario, torch.arange(len(batch.scenario))
    own, gate, dm = v[n, t], tensors[str(stage.gate)].to(v.dtype), tensors[str(stage.d_mutual)]
    alpha = tensors[str(stage.alpha)][batch.permutation]
    c = _alpha(v, stage.score, batch.temperature)[0][n, t]
    foreign = torch.arange(stage.num_scenarios) != t[:, None]
    mix = (alpha[:, None] @ v).squeeze(1)
    d_gate = dm * mix * gate * (1 - gate)
    tensors[str(stage.d_gate)].copy_(d_gate if stage.gate_width == stage.d else d_gate.sum(1, keepdim=True))
    p = (v @ (dm * gate)[:, :, None]).squeeze(2)
    r = alpha * (p - (alpha * p).sum(1, keepdim=True))
    if stage.score == "ratio":
        c = c.masked_fill(~foreign, 0.0)
        total = c.sum(1, keepdim=True)
        degenerate = total.abs() < DEGENERATE_SUM
        total = torch.where(degenerate, 1.0, total)
        dc = torch.where(degenerate | ~foreign, 0.0, r / total - (r * c).sum(1, keepdim=True) / total**2)
    else:
        dc = (r / batch.temperature).masked_fill(~foreign, 0.0)
    length = own.norm(dim=1, keepdim=True)
    norm = length.clamp_min(NORM_EPSILON)
    toward = (dc[:, None] @ (v / v.norm(dim=2, keepdim=True).clamp_min(NORM_EPSILON))).squeeze(1)
    along = torch.where(length > NORM_EPSILON, (dc * c).sum(1, keepdim=True) / norm, 0.0) * own
    tensors[str(stage.d_own)].copy_(dm + (toward - along) / norm)


def _weight_gradient(stage: WeightGradient, tensors: Tensors, batch: Batch) -> None:
    parts = [_rows(rows, tensors, batch, batch.scenario) for rows in (stage.first, stage.second) if rows.present]
    x, dz = torch.cat(parts, 1), tensors[str(stage.dz)]
    d_weight = tensors[str(stage.d_weight)].view(-1, x.shape[1], stage.n)
    d_bias = tensors[str(stage.d_bias)].view(-1, stage.n)
    for k in range(len(d_weight)):
        rows = batch.scenario == k if stage.by_scenario else torch.ones_like(batch.scenario, dtype=torch.bool)
        d_weight[k] = x[rows].T @ dz[rows].to(x.dtype)
        d_bias[k] = dz[rows].to(x.dtype).sum(0)


_KINDS: dict[type[Stage], Any] = {
    Layer: _layer,
    InputGradient: _input_gradient,
    QuantizeRows: _quantize_rows,
    QuantizedLayer: _quantized_layer,
    MutualOwnRow: _mutual_own_row,
    MutualTable: _mutual_table,
    MutualBackward: _mutual_backward,
    WeightGradient: _weight_gradient,
}
