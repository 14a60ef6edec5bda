"""Operations over a fused trunk: one autograd.Function, whichever engine computes forward and backward.

An engine computes the trunk on rows sorted by scenario, forward and backward as two plain functions; what backward
needs is decided once, here. A call costs a few microseconds less than through torch.library.custom_op.

Forward keeps for backward, all with rows sorted by scenario: the inputs; per layer the own stream V_t and the auxiliary
stream A (their arguments too where δ's derivative needs them); per mutual layer M_t, the gate, the own rows of α and,
unless they are recomputed, the streams of all branches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saml_kernels import reference
from saml_kernels.structures import Grouping, TrunkOutput, TrunkParams

ACTIVATION_IDS = {name: index for index, name in enumerate(("relu", "leaky_relu", "gelu", "silu", "tanh", "identity"))}
SCORE_IDS = {"ratio": 0, "softmax": 1}
RECOMPUTE_BYTES = 2**30
"""recompute="auto" keeps the streams of all branches up to this size and recomputes larger ones."""


@dataclass(frozen=True)
class Engine:
    """What computes the trunk: functions with the signatures of the operators in csrc/ops.cpp."""

    group_by_scenario: Callable[[Tensor, int], Grouping]
    trunk_forward: Callable[..., Any]
    trunk_backward: Callable[..., Any]
    mutual_forward: Callable[..., Any]
    mutual_backward: Callable[..., Any]
    computing_dtype: Callable[[torch.dtype], torch.dtype]
    """The dtype in which it takes inputs and parameters, by that of the caller's."""


def multi_branch(
    engine: Engine,
    x_local: Tensor,
    x_global: Tensor,
    scenario: Tensor,
    params: TrunkParams,
    *,
    activation: str,
    score: str,
    temperature: float,
    stop_gradient: bool,
    foreign_dtype: torch.dtype | None,
    return_scores: bool,
    recompute: bool | str,
) -> TrunkOutput:
    """See :func:`saml_kernels.multi_branch`."""
    mutual = [layer for layer, weight in enumerate(params.gate_weights) if weight is not None]
    plan = Plan(
        activations=(ACTIVATION_IDS[activation],) * len(params.branch_weights),
        mutual_layers=tuple(mutual),
        score=SCORE_IDS[score],
        temperature=temperature,
        own_bfloat16=x_local.dtype == torch.bfloat16,
        foreign_bfloat16=torch.bfloat16 in (x_local.dtype, foreign_dtype),
        recompute=_recompute(recompute, x_local, params, mutual),
        reference_options={
            "activation": activation,
            "score": score,
            "temperature": temperature,
            "stop_gradient": stop_gradient,
            "foreign_dtype": foreign_dtype,
            "return_scores": False,
        },
    )
    gates = [params.gate_weights[layer] for layer in mutual], [params.gate_biases[layer] for layer in mutual]
    lists = (params.branch_weights, params.branch_biases, params.aux_weights, params.aux_biases, *gates)
    own, aux, *alphas = _run(engine, x_local, x_global, scenario, plan, lists)
    scores: list[Tensor | None] = [None] * len(params.branch_weights)
    for layer, alpha in zip(mutual, alphas, strict=True):
        scores[layer] = alpha
    return TrunkOutput(own, aux, tuple(scores) if return_scores else None)


def grouped_mlp(
    engine: Engine,
    x: Tensor,
    scenario: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str,
    output_activation: str,
) -> Tensor:
    """See :func:`saml_kernels.grouped_mlp`; the trunk without auxiliary network and mutual unit."""
    names = [activation] * (len(weights) - 1) + [output_activation]
    bfloat16 = x.dtype == torch.bfloat16
    plan = Plan(
        activations=tuple(ACTIVATION_IDS[name] for name in names),
        mutual_layers=(),
        score=SCORE_IDS["ratio"],
        temperature=1.0,
        own_bfloat16=bfloat16,
        foreign_bfloat16=bfloat16,
        recompute=False,
        reference_options={"activation": activation, "output_activation": output_activation},
    )
    own, _ = _run(engine, x, x.new_empty(x.shape[0], 0), scenario, plan, (weights, biases, (), (), (), ()))
    return own


def branch_scores(
    engine: Engine,
    x: Tensor,
    scenario: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str,
    output_activation: str,
    foreign_dtype: torch.dtype | None,
) -> Tensor:
    """See :func:`saml_kernels.branch_scores`; the trunk whose layers are all run by all branches."""
    names = [activation] * (len(weights) - 1) + [output_activation]
    plan = Plan(
        activations=tuple(ACTIVATION_IDS[name] for name in names),
        mutual_layers=(),
        score=SCORE_IDS["ratio"],
        temperature=1.0,
        own_bfloat16=x.dtype == torch.bfloat16,
        foreign_bfloat16=torch.bfloat16 in (x.dtype, foreign_dtype),
        recompute=False,
        reference_options={
            "activation": activation,
            "output_activation": output_activation,
            "foreign_dtype": foreign_dtype,
        },
        all_branches=True,
    )
    scores, _ = _run(engine, x, x.new_empty(x.shape[0], 0), scenario, plan, (weights, biases, (), (), (), ()))
    return scores


def mutual_unit(
    engine: Engine,
    v: Tensor,
    scenario: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    *,
    score: str,
    temperature: float,
    stop_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`saml_kernels.mutual_unit`; returns M_t (B, d) and the own rows of α (B, M)."""
    options = {"score": score, "temperature": temperature, "stop_gradient": stop_gradient}
    outputs: tuple[Tensor, Tensor] = _MutualUnit.apply(engine, v, scenario, gate_weight, gate_bias, options)
    return outputs


@dataclass(frozen=True)
class Plan:
    """The trunk's options as the operators take them, and as the reference does."""

    activations: tuple[int, ...]
    mutual_layers: tuple[int, ...]
    score: int
    temperature: float
    own_bfloat16: bool
    foreign_bfloat16: bool
    recompute: bool
    reference_options: dict[str, Any]
    all_branches: bool = False
    """Own is (B, M, d_L), the last layer of every branch, of which the foreign ones are constants."""

    def arguments(self) -> tuple[Any, ...]:
        """As both operators take them, after the parameters."""
        return (
            self.mutual_layers,
            self.activations,
            self.score,
            self.temperature,
            self.own_bfloat16,
            self.foreign_bfloat16,
        )


Lists = tuple[list[Tensor], ...]


def _run(
    engine: Engine,
    x_local: Tensor,
    x_global: Tensor,
    scenario: Tensor,
    plan: Plan,
    lists: Sequence[Sequence[Tensor | None]],
) -> tuple[Tensor, ...]:
    """own, aux and the own rows of α of every mutual layer, in the caller's order."""
    lengths = [len(entries) for entries in lists]
    flat = [entry for entries in lists for entry in entries]
    # Inside an autograd.Function needs_input_grad does not tell whether gradients are switched off.
    inputs = (x_local, x_global, *flat)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    outputs: tuple[Tensor, ...] = _Trunk.apply(engine, x_local, x_global, scenario, plan, lengths, keep, *flat)
    return outputs


class _Trunk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        x_local: Tensor,
        x_global: Tensor,
        scenario: Tensor,
        plan: Plan,
        lengths: list[int],
        keep: bool,
        *flat: Tensor,
    ) -> tuple[Tensor, ...]:
        grouping = engine.group_by_scenario(scenario, flat[0].shape[0])
        dtype = engine.computing_dtype(x_local.dtype)
        local_sorted = x_local.index_select(0, grouping.permutation).to(dtype)
        global_sorted = x_global.index_select(0, grouping.permutation).to(dtype)
        own, aux, scores, kept = engine.trunk_forward(
            local_sorted,
            global_sorted,
            grouping.permutation,
            grouping.offsets,
            *_split(flat, lengths, dtype),
            *plan.arguments(),
            keep,
            plan.recompute,
            plan.all_branches,
        )
        alphas = [alpha.index_select(0, grouping.inverse) for alpha in scores]
        ctx.mark_non_differentiable(*alphas)
        if keep:
            ctx.engine, ctx.plan, ctx.lengths, ctx.num_scores = engine, plan, lengths, len(scores)
            ctx.save_for_backward(
                x_local, x_global, scenario, local_sorted, global_sorted, *grouping, *flat, *scores, *kept
            )
        return own.to(x_local.dtype), aux.to(x_local.dtype), *alphas

    @staticmethod
    def backward(ctx: Any, grad_own: Tensor, grad_aux: Tensor, *grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        x_local, x_global, scenario, local_sorted, global_sorted, permutation, _, offsets, *rest = ctx.saved_tensors
        num_params = sum(ctx.lengths)
        flat, scores, kept = (
            rest[:num_params],
            rest[num_params : num_params + ctx.num_scores],
            rest[num_params + ctx.num_scores :],
        )
        _, needs_local, needs_global, _, _, _, _, *needs_params = ctx.needs_input_grad
        if ctx.plan.all_branches and not torch.is_grad_enabled():
            grad_own = grad_own[torch.arange(len(scenario)), scenario]
        if torch.is_grad_enabled():
            # create_graph: the gradient itself must be differentiable, which the reference's is.
            local, glob, *params = aliases = _aliases((x_local, x_global, *flat))
            outputs = _reference_outputs(ctx.plan, local, glob, scenario, params, ctx.lengths)
            gradients = _differentiable_gradients(outputs, [grad_own, grad_aux], aliases)
        else:
            local_gradient, global_gradient, *lists = ctx.engine.trunk_backward(
                grad_own.to(local_sorted.dtype).contiguous(),
                grad_aux.to(local_sorted.dtype).contiguous(),
                scores,
                kept,
                local_sorted,
                global_sorted,
                permutation,
                offsets,
                *_split(flat, ctx.lengths, local_sorted.dtype),
                *ctx.plan.arguments(),
                ctx.plan.recompute,
                needs_local,
                needs_global,
            )
            gradients = [local_gradient, global_gradient, *(entry for entries in lists for entry in entries)]
        inputs, needs = (x_local, x_global, *flat), (needs_local, needs_global, *needs_params)
        local_gradient, global_gradient, *param_gradients = (
            gradient.to(tensor.dtype) if need else None
            for gradient, tensor, need in zip(gradients, inputs, needs, strict=True)
        )
        return None, local_gradient, global_gradient, None, None, None, None, *param_gradients


class _MutualUnit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        v: Tensor,
        scenario: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        grouping = engine.group_by_scenario(scenario, v.shape[1])
        dtype = engine.computing_dtype(v.dtype)
        ctx.engine, ctx.options, ctx.scalars = (
            engine,
            options,
            (SCORE_IDS[options["score"]], options["temperature"], v.dtype == torch.bfloat16),
        )
        streams = v.index_select(0, grouping.permutation).to(dtype)
        gate_tensors = [tensor.to(dtype).contiguous() for tensor in (gate_weight, gate_bias)]
        own, scores, *kept = engine.mutual_forward(
            streams, grouping.permutation, grouping.offsets, *gate_tensors, *ctx.scalars
        )
        alpha = scores.index_select(0, grouping.inverse)
        ctx.mark_non_differentiable(alpha)
        ctx.save_for_backward(v, scenario, gate_weight, gate_bias, streams, *grouping, scores, *kept)
        return own.to(v.dtype), alpha

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, grad_alpha: Tensor) -> tuple[Tensor | None, ...]:
        v, scenario, gate_weight, gate_bias, streams, permutation, _, offsets, *kept = ctx.saved_tensors
        inputs = (v, gate_weight, gate_bias)
        if torch.is_grad_enabled():
            streams, weight, bias = aliases = _aliases(inputs)
            own, _ = reference.mutual_unit(streams, scenario, weight, bias, **ctx.options)
            gradients = _differentiable_gradients([own], [gradient], aliases)
        else:
            gradients = ctx.engine.mutual_backward(
                gradient.to(streams.dtype).contiguous(),
                *kept,
                streams,
                permutation,
                offsets,
                *(tensor.to(streams.dtype).contiguous() for tensor in (gate_weight, gate_bias)),
                *ctx.scalars,
            )
        grad_v, grad_weight, grad_bias = (grad.to(tensor.dtype) for grad, tensor in zip(gradients, inputs, strict=True))
        return None, grad_v, None, grad_weight, grad_bias, None


def _split(flat: Sequence[Tensor], lengths: Sequence[int], dtype: torch.dtype) -> list[list[Tensor]]:
    """The six parameter lists again, as the operators read them."""
    entries = iter(flat)
    return [[next(entries).to(dtype).contiguous() for _ in range(length)] for length in lengths]


def _reference_outputs(
    plan: Plan, x_local: Tensor, x_global: Tensor, scenario: Tensor, flat: Sequence[Tensor], lengths: Sequence[int]
) -> list[Tensor]:
    """own and, with an auxiliary network, aux, computed by the reference."""
    entries = iter(flat)
    branch_weights, branch_biases, aux_weights, aux_biases, gate_weights, gate_biases = (
        [next(entries) for _ in range(length)] for length in lengths
    )
    if plan.all_branches:
        return [reference.branch_scores(x_local, scenario, branch_weights, branch_biases, **plan.reference_options)]
    if not aux_weights:
        return [reference.grouped_mlp(x_local, scenario, branch_weights, branch_biases, **plan.reference_options)]
    gates: list[list[Tensor | None]] = [[None] * len(branch_weights) for _ in range(2)]
    for index, layer in enumerate(plan.mutual_layers):
        gates[0][layer], gates[1][layer] = gate_weights[index], gate_biases[index]
    params = TrunkParams(branch_weights, branch_biases, aux_weights, aux_biases, *gates)
    output = reference.multi_branch(x_local, x_global, scenario, params, **plan.reference_options)
    return [output.own, output.aux]


def _aliases(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Children of the tensors in the graph: a gradient with respect to one of them does not go on through another
    that was computed from the same tensor."""
    return [tensor.view_as(tensor) for tensor in tensors]


def _differentiable_gradients(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of all inputs with a graph of their own; an empty tensor where none is required."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    # The auxiliary stream depends on none of them where x_local or branch parameters alone require a gradient.
    live = [(output, cotangent) for output, cotangent in zip(outputs, cotangents, strict=False) if output.requires_grad]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in live],
            wanted,
            [cotangent for _, cotangent in live],
            create_graph=True,
            materialize_grads=True,
        )
    )
    return [next(found) if tensor.requires_grad else tensor.new_empty(0) for tensor in inputs]


def _recompute(recompute: bool | str, x_local: Tensor, params: TrunkParams, mutual: Sequence[int]) -> bool:
    if isinstance(recompute, bool):
        return recompute
    width = sum(params.branch_weights[layer].shape[2] for layer in mutual)
    size = x_local.shape[0] * params.branch_weights[0].shape[0] * width * max(4, x_local.element_size())
    return size > RECOMPUTE_BYTES
