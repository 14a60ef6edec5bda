"""Operations over a fused trunk, and experts: an autograd.Function each, whichever engine computes both passes.

An engine computes forward and backward as two plain functions and says what backward needs; a call costs a few
microseconds less than through torch.library.custom_op. What is saved: per layer the own stream V_t and the auxiliary
stream A (their arguments too where δ's derivative needs them); per mutual layer M_t, the gate, the own rows of α and,
unless they are recomputed, the streams of all branches; of a gate sigmoid(z_L) in V_t's place. Of experts V_k of every
layer and expert.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from saml_kernels import reference, tracing
from saml_kernels.types import TrunkOutput, TrunkParams

RECOMPUTE_BYTES = 2**30
"""recompute="auto" keeps the streams of all branches up to this size and recomputes larger ones."""


class ParameterLists(NamedTuple):
    """The trunk's parameters as engines take them: contiguous, one entry a layer; gates of mutual layers only."""

    branch_weights: list[Tensor]
    branch_biases: list[Tensor]
    aux_weights: list[Tensor]
    aux_biases: list[Tensor]
    gate_weights: list[Tensor]
    gate_biases: list[Tensor]
    shared_weights: list[Tensor]
    """W_shared, where the branches' weights are W_t ∘ W_shared; else none."""


@dataclass(frozen=True)
class Plan:
    """The trunk's options by layer, as an engine reads them, and as the reference does."""

    activations: tuple[str, ...]
    """Names of δ, layer by layer."""
    mutual_layers: tuple[int, ...]
    """Layers with a mutual unit, from 0."""
    score: str
    temperature: float
    foreign_dtype: torch.dtype | None
    recompute: bool
    """Backward computes the streams of all branches again."""
    reference_options: dict[str, Any]
    """Keywords of the reference's function, for a second derivative."""
    return_scores: bool = False
    """The own rows of α are asked for."""
    all_branches: bool = False
    """Own is (B, M, d_L), the last layer of every branch, of which the foreign ones are constants."""
    gate_scale: float | None = None
    """γ of a trunk that gates: own is γ sigmoid(z_L) ∘ gated, and the last δ is the identity."""
    schedule: str | None = None
    """How the Triton engine launches the forward; None: it chooses."""


class FusedBackend(ABC):
    """A backend that computes forward and backward by itself, behind an autograd.Function.

    A subclass computes the trunk, the mutual unit and the experts in two functions each. Their tensors are the
    caller's, contiguous, in his order of rows and his dtype.
    """

    name: str

    def forms_products(self, dtype: torch.dtype) -> bool:
        """Whether its kernels form W_t ∘ W_shared where they read it, of weights of this type."""
        return False

    @abstractmethod
    def trunk_forward(
        self,
        x_local: Tensor,
        x_global: Tensor,
        gated: Tensor | None,
        scenario: Tensor,
        lists: ParameterLists,
        plan: Plan,
        save: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor], dict[str, Tensor]]:
        """own, aux, the own rows of α of every mutual layer (none unless the plan returns them), and with ``save`` what
        backward needs."""

    @abstractmethod
    def trunk_backward(
        self,
        grad_own: Tensor,
        grad_aux: Tensor,
        x_local: Tensor,
        x_global: Tensor,
        gated: Tensor | None,
        scenario: Tensor,
        lists: ParameterLists,
        saved: dict[str, Tensor],
        plan: Plan,
        need_local: bool,
        need_global: bool,
    ) -> tuple[Tensor, Tensor, Tensor, *tuple[list[Tensor], ...]]:
        """Gradients of x_local, x_global and gated (anything where none is needed), then of the seven lists. What it
        takes out of ``saved`` is freed, unless somebody keeps the graph."""

    @abstractmethod
    def mutual_forward(
        self, v: Tensor, scenario: Tensor, gate_weight: Tensor, gate_bias: Tensor, score: str, temperature: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """M_t (B, d), own rows of α (B, M), and what backward needs."""

    @abstractmethod
    def mutual_backward(
        self,
        gradient: Tensor,
        v: Tensor,
        scenario: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor,
        saved: dict[str, Tensor],
        score: str,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of v, the gate's weight and its bias."""

    @abstractmethod
    def experts_forward(
        self, x: Tensor, weights: list[Tensor], biases: list[Tensor], activations: tuple[str, ...], save: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """E_k(x) (B, K, d_L), and with ``save`` what backward needs besides; activations by their names."""

    @abstractmethod
    def experts_backward(
        self,
        gradient: Tensor,
        out: Tensor,
        x: Tensor,
        weights: list[Tensor],
        biases: list[Tensor],
        saved: dict[str, Tensor],
        activations: tuple[str, ...],
        need_input: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Gradients of x (anything where not needed), the weights and the biases; ``out`` is the forward's."""

    def multi_branch(
        self,
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
        schedule: str,
    ) -> TrunkOutput:
        """See :func:`saml_kernels.multi_branch`."""
        mutual = [layer for layer, weight in enumerate(params.gate_weights) if weight is not None]
        plan = Plan(
            activations=(activation,) * len(params.branch_weights),
            mutual_layers=tuple(mutual),
            score=score,
            temperature=temperature,
            foreign_dtype=foreign_dtype,
            recompute=_recompute(recompute, x_local, params, mutual),
            reference_options={
                "activation": activation,
                "score": score,
                "temperature": temperature,
                "stop_gradient": stop_gradient,
                "foreign_dtype": foreign_dtype,
                "return_scores": False,
            },
            return_scores=return_scores,
            schedule=None if schedule == "auto" else schedule,
        )
        gates = [params.gate_weights[layer] for layer in mutual], [params.gate_biases[layer] for layer in mutual]
        lists = (params.branch_weights, params.branch_biases, params.aux_weights, params.aux_biases, *gates, ())
        own, aux, *alphas = _run(self, x_local, x_global, None, scenario, plan, lists)
        if not return_scores:
            return TrunkOutput(own, aux, None)
        scores: list[Tensor | None] = [None] * len(params.branch_weights)
        for layer, alpha in zip(mutual, alphas, strict=True):
            scores[layer] = alpha
        return TrunkOutput(own, aux, tuple(scores))

    def grouped_mlp(
        self,
        x: Tensor,
        scenario: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *,
        activation: str,
        output_activation: str,
        gated: Tensor | None,
        gate_scale: float,
        shared_weights: Sequence[Tensor],
    ) -> Tensor:
        """See :func:`saml_kernels.grouped_mlp`; the trunk without auxiliary network and mutual unit."""
        if not self.forms_products(x.dtype):
            weights, shared_weights = reference.products(weights, shared_weights), ()
        names = [activation] * (len(weights) - 1) + [output_activation]
        plan = Plan(
            activations=tuple(names),
            mutual_layers=(),
            score="ratio",
            temperature=1.0,
            foreign_dtype=None,
            recompute=False,
            reference_options={"activation": activation, "output_activation": output_activation},
            gate_scale=None if gated is None else gate_scale,
        )
        lists = (weights, biases, (), (), (), (), shared_weights)
        own, _ = _run(self, x, x.new_empty(x.shape[0], 0), gated, scenario, plan, lists)
        return own

    def branch_scores(
        self,
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
            activations=tuple(names),
            mutual_layers=(),
            score="ratio",
            temperature=1.0,
            foreign_dtype=foreign_dtype,
            recompute=False,
            reference_options={
                "activation": activation,
                "output_activation": output_activation,
                "foreign_dtype": foreign_dtype,
            },
            all_branches=True,
        )
        lists = (weights, biases, (), (), (), (), ())
        scores, _ = _run(self, x, x.new_empty(x.shape[0], 0), None, scenario, plan, lists)
        return scores

    def expert_outputs(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *,
        activation: str,
        output_activation: str,
    ) -> Tensor:
        """See :func:`saml_kernels.expert_outputs`."""
        activations = (*[activation] * (len(weights) - 1), output_activation)
        inputs = (x, *weights, *biases)
        if not _needs_graph(inputs):
            return self.experts_forward(*_experts_arguments(x, inputs[1:]), activations, False)[0]
        out: Tensor = FusedExperts.apply(self, activations, *inputs)
        return out

    def mutual_unit(
        self,
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
        if not _needs_graph((v, gate_weight, gate_bias)):
            gate = gate_weight.contiguous(), gate_bias.contiguous()
            own, alpha, _ = self.mutual_forward(v.contiguous(), scenario, *gate, score, temperature)
            return own, alpha
        options = {"score": score, "temperature": temperature, "stop_gradient": stop_gradient}
        outputs: tuple[Tensor, Tensor] = FusedMutualUnit.apply(self, v, scenario, gate_weight, gate_bias, options)
        return outputs


def _run(
    backend: FusedBackend,
    x_local: Tensor,
    x_global: Tensor,
    gated: Tensor | None,
    scenario: Tensor,
    plan: Plan,
    lists: Sequence[Sequence[Tensor | None]],
) -> tuple[Tensor, ...]:
    """own, aux and, if the plan returns them, the own rows of α of every mutual layer, in the caller's order."""
    flat = [entry for entries in lists for entry in entries]
    if not _needs_graph((x_local, x_global, gated, *flat)):
        arguments = _trunk_arguments(x_local, x_global, gated, scenario, lists)
        own, aux, alphas, _ = backend.trunk_forward(*arguments, plan, False)
        return own, aux, *alphas
    lengths = [len(entries) for entries in lists]
    x_local, x_global, gated, *flat = _distinct([x_local, x_global, gated, *flat])
    outputs: tuple[Tensor, ...] = FusedTrunk.apply(backend, plan, lengths, x_local, x_global, gated, scenario, *flat)
    return outputs


def _distinct(tensors: list[Any]) -> list[Any]:
    """In compiled code a view where a tensor is given twice: torch.compile takes no function of one tensor twice."""
    if not torch.compiler.is_compiling():
        return tensors
    distinct: list[Any] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is earlier for earlier in distinct)
        distinct.append(tensor.view_as(tensor) if repeated else tensor)
    return distinct


def _needs_graph(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a backward pass may follow. An exported program has none: its operators have no derivative."""
    if not torch.is_grad_enabled() or tracing.is_exporting():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


# The functions take *arguments: where forward has as many parameters as it is given arguments, torch.compile takes the
# first of them for a missing context.


class FusedTrunk(torch.autograd.Function):
    """A trunk, by a backend: (backend, plan, lengths of the lists, x_local, x_global, gated, scenario, *flat lists)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        backend, plan, lengths, x_local, x_global, gated, scenario, *flat = arguments
        arguments = _trunk_arguments(x_local, x_global, gated, scenario, _split(flat, lengths))
        own, aux, alphas, saved = backend.trunk_forward(*arguments, plan, True)
        ctx.mark_non_differentiable(*alphas)
        ctx.backend, ctx.plan, ctx.lengths, ctx.saved_names = backend, plan, lengths, tuple(saved)
        ctx.save_for_backward(x_local, x_global, gated, scenario, *flat, *saved.values())
        return own, aux, *alphas

    @staticmethod
    def backward(ctx: Any, grad_own: Tensor, grad_aux: Tensor, *grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        (x_local, x_global, gated, scenario, *flat), saved = _saved(ctx)
        _, _, _, needs_local, needs_global, needs_gated, _, *needs_params = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # create_graph: the gradient itself must be differentiable, which the reference's is.
            nothing = x_local.new_empty(0)
            inputs = (x_local, x_global, nothing if gated is None else gated, *flat)
            local, glob, scaled, *params = aliases = _aliases(inputs)
            outputs = _reference_outputs(ctx.plan, local, glob, scaled, scenario, params, ctx.lengths)
            gradients = _differentiable_gradients(outputs, [grad_own, grad_aux], aliases)
        else:
            local_gradient, global_gradient, gated_gradient, *lists = ctx.backend.trunk_backward(
                grad_own.contiguous(),
                grad_aux.contiguous(),
                *_trunk_arguments(x_local, x_global, gated, scenario, _split(flat, ctx.lengths)),
                saved,
                ctx.plan,
                needs_local,
                needs_global,
            )
            gradients = [local_gradient, global_gradient, gated_gradient, *(entry for each in lists for entry in each)]
        needs = (needs_local, needs_global, needs_gated, *needs_params)
        local_gradient, global_gradient, gated_gradient, *param_gradients = (
            gradient.to(x_local.dtype) if need else None for gradient, need in zip(gradients, needs, strict=True)
        )
        return None, None, None, local_gradient, global_gradient, gated_gradient, None, *param_gradients


class FusedMutualUnit(torch.autograd.Function):
    """The mutual unit, by a backend."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: FusedBackend,
        v: Tensor,
        scenario: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        ctx.backend, ctx.options = backend, options
        ctx.scalars = options["score"], options["temperature"]
        own, alpha, saved = backend.mutual_forward(
            v.contiguous(), scenario, gate_weight.contiguous(), gate_bias.contiguous(), *ctx.scalars
        )
        ctx.mark_non_differentiable(alpha)
        ctx.saved_names = tuple(saved)
        ctx.save_for_backward(v, scenario, gate_weight, gate_bias, *saved.values())
        return own, alpha

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, grad_alpha: Tensor) -> tuple[Tensor | None, ...]:
        (v, scenario, gate_weight, gate_bias), saved = _saved(ctx)
        inputs = (v, gate_weight, gate_bias)
        if torch.is_grad_enabled():
            streams, weight, bias = aliases = _aliases(inputs)
            own, _ = reference.mutual_unit(streams, scenario, weight, bias, **ctx.options)
            gradients = _differentiable_gradients([own], [gradient], aliases)
        else:
            gradients = ctx.backend.mutual_backward(
                gradient.contiguous(),
                v.contiguous(),
                scenario,
                gate_weight.contiguous(),
                gate_bias.contiguous(),
                saved,
                *ctx.scalars,
            )
        grad_v, grad_weight, grad_bias = (grad.to(tensor.dtype) for grad, tensor in zip(gradients, inputs, strict=True))
        return None, grad_v, None, grad_weight, grad_bias, None


class FusedExperts(torch.autograd.Function):
    """Experts, by a backend: (backend, activations, x, *weights, *biases)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        backend, activations, x, *flat = arguments
        out, saved = backend.experts_forward(*_experts_arguments(x, flat), activations, True)
        ctx.backend, ctx.activations, ctx.saved_names = backend, activations, tuple(saved)
        ctx.save_for_backward(out, x, *flat, *saved.values())
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (out, x, *flat), saved = _saved(ctx)
        _, _, needs_input, *needs_params = ctx.needs_input_grad
        if torch.is_grad_enabled():
            alias, *parameters = aliases = _aliases((x, *flat))
            outputs = [reference.experts(alias, *_halves(parameters), ctx.activations)]
            gradients = _differentiable_gradients(outputs, [gradient], aliases)
        else:
            x_gradient, *lists = ctx.backend.experts_backward(
                gradient.contiguous(), out, *_experts_arguments(x, flat), saved, ctx.activations, needs_input
            )
            gradients = [x_gradient, *(entry for entries in lists for entry in entries)]
        needs = (needs_input, *needs_params)
        found = (grad.to(x.dtype) if need else None for grad, need in zip(gradients, needs, strict=True))
        return None, None, *found


def _saved(ctx: Any) -> tuple[list[Any], dict[str, Tensor]]:
    """What was saved: the call's own tensors, and by their names the engine's. Unless the graph is kept the engine's
    are then the dictionary's alone: what is taken out of it is freed."""
    tensors = ctx.saved_tensors
    count = len(tensors) - len(ctx.saved_names)
    # Compiled code frees what it no longer reads by itself.
    if not torch.compiler.is_compiling():
        ctx.maybe_clear_saved_tensors()
    return list(tensors[:count]), dict(zip(ctx.saved_names, tensors[count:], strict=True))


def _trunk_arguments(
    x_local: Tensor,
    x_global: Tensor,
    gated: Tensor | None,
    scenario: Tensor,
    lists: Iterable[Iterable[Any]],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, ParameterLists]:
    """As a backend takes them."""
    gated = None if gated is None else gated.contiguous()
    contiguous = ParameterLists(*[[entry.contiguous() for entry in entries] for entries in lists])
    return x_local.contiguous(), x_global.contiguous(), gated, scenario, contiguous


def _experts_arguments(x: Tensor, flat: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """As a backend takes them."""
    return x.contiguous(), *_halves([tensor.contiguous() for tensor in flat])


def _halves(flat: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases again."""
    layers = len(flat) // 2
    return list(flat[:layers]), list(flat[layers:])


def _split(flat: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """The parameter lists again."""
    entries = iter(flat)
    return [[next(entries) for _ in range(length)] for length in lengths]


def _reference_outputs(
    plan: Plan,
    x_local: Tensor,
    x_global: Tensor,
    gated: Tensor,
    scenario: Tensor,
    flat: Sequence[Tensor],
    lengths: Sequence[int],
) -> list[Tensor]:
    """own and, with an auxiliary network, aux, computed by the reference."""
    branch_weights, branch_biases, aux_weights, aux_biases, gate_weights, gate_biases, shared_weights = _split(
        flat, lengths
    )
    if plan.all_branches:
        return [reference.branch_scores(x_local, scenario, branch_weights, branch_biases, **plan.reference_options)]
    if not aux_weights:
        gate = {} if plan.gate_scale is None else {"gated": gated, "gate_scale": plan.gate_scale}
        options = plan.reference_options | gate | {"shared_weights": shared_weights}
        return [reference.grouped_mlp(x_local, scenario, branch_weights, branch_biases, **options)]
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
    # Without a backward there is nothing to decide, and a comparison with the batch size would be a bound on it in an
    # exported program.
    if not torch.is_grad_enabled() or tracing.is_exporting():
        return False
    width = sum(params.branch_weights[layer].shape[2] for layer in mutual)
    size = x_local.shape[0] * params.branch_weights[0].shape[0] * width * max(4, x_local.element_size())
    return size > RECOMPUTE_BYTES
