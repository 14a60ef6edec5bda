"""The public functions: argument checks, autocast, choice of backend.

Under autocast every float32, float16 and bfloat16 tensor is cast to the autocast type first, as for a matrix product,
and the function then runs in that type.
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from saml_kernels import autocast, checks
from saml_kernels.activations import ACTIVATIONS
from saml_kernels.backends import BACKEND_CHOICES, choose_backend
from saml_kernels.types import TrunkOutput, TrunkParams


def multi_branch(
    x_local: Tensor,
    x_global: Tensor,
    scenario: Tensor,
    params: TrunkParams,
    *,
    activation: str = "relu",
    score: str = "ratio",
    temperature: float = 0.1,
    stop_gradient: bool = True,
    foreign_dtype: torch.dtype | None = None,
    backend: str = "auto",
    return_scores: bool = False,
    recompute: bool | Literal["auto"] = "auto",
    schedule: str = "auto",
    form: str | None = None,
) -> TrunkOutput:
    """Auxiliary network, M scenario branches and their mutual units; returns every sample's own branch.

    Formulas in docs/computation.md; SAML, arXiv 2012.08952, sections on the multi-branch network and mutual unit.

    Args:
        x_local: (B, D_l) scenario-dependent features read by all branches, or (B, M, D_l), one view per branch.
            float32, float64, bfloat16 or float16, as all tensors but ``scenario``.
        x_global: (B, D_g) scenario-independent features.
        scenario: (B,) or (B, 1) of any integer type, own scenario t of each sample, in [0, M).
        params: weights per layer; the shapes decide M, L, the widths, and which layers have a mutual unit and gate.
        activation: δ, one of "relu", "leaky_relu" (0.01), "gelu" (tanh form), "silu", "tanh", "identity".
        score: "ratio", the paper's softmax over c_ij / Σ c_ij, or "softmax" over c_ij / temperature.
        temperature: τ of score "softmax".
        stop_gradient: a sample trains its own branch only. False differentiates everything.
        foreign_dtype: None, or torch.bfloat16, torch.int8, torch.float8_e4m3fn: inputs and weights of foreign
            branches are quantised to it in every call (8 bits: W8A8 with a scale per row and per column); needs
            ``stop_gradient``.
        backend: "auto", "reference", "cpp" or "triton".
        return_scores: also return the own rows of α, which carry no gradient.
        recompute: whether backward computes the streams of all branches again instead of keeping them (B, M, d_l)
            per mutual layer; "auto" decides by their size. The reference always keeps them.
        schedule: how the Triton kernels run the forward: "persistent", one launch; "per_layer", layers of all branches
            in launches of their own, which a ``foreign_dtype`` needs; "auto", by a table. Needs backend
            "triton" or "auto" unless it is "auto".
        form: deprecated name of ``schedule``, with "single" for "persistent" and "staged" for "per_layer".

    Returns:
        TrunkOutput: ``own`` (B, d_L), ``aux`` (B, a_L), ``scores`` None or per layer None | (B, M). ``scores`` are
        float32 where the inputs are bfloat16 or float16.

    Raises:
        TypeError: wrong types, or tensors of different dtypes.
        ValueError: shapes that do not fit, unknown options, tensors on different devices, an id out of range (on a
            GPU that is a device assertion, so that the call need not wait for the device).
        BackendUnavailable: a backend named explicitly cannot run this here.
    """
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_choice("score", score, checks.SCORES)
    temperature = checks.check_positive("temperature", temperature)
    checks.check_choice("backend", backend, BACKEND_CHOICES)
    if recompute not in (True, False, "auto"):
        raise ValueError(f"recompute must be True, False or 'auto', got {recompute!r}")
    schedule = checks.check_schedule(schedule, form)
    check_foreign_dtype(foreign_dtype, stop_gradient)
    device_type = autocast.device_type(x_local)
    if autocast.is_on(device_type):
        x_local, x_global = autocast.cast(x_local, device_type), autocast.cast(x_global, device_type)
        if isinstance(params, TrunkParams):
            params = TrunkParams._make([autocast.cast(entry, device_type) for entry in entries] for entries in params)
    scenario = checks.scenario_ids(scenario)
    checks.check_trunk(x_local, x_global, scenario, params)
    chosen = choose_backend(
        backend, "multi_branch", x_local, stop_gradient=stop_gradient, foreign_dtype=foreign_dtype, schedule=schedule
    )
    with autocast.off(device_type):
        return chosen.multi_branch(
            x_local,
            x_global,
            scenario,
            params,
            activation=activation,
            score=score,
            temperature=temperature,
            stop_gradient=stop_gradient,
            foreign_dtype=foreign_dtype,
            return_scores=return_scores,
            recompute=recompute,
            schedule=schedule,
        )


def grouped_mlp(
    x: Tensor,
    scenario: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str = "relu",
    output_activation: str | None = None,
    gated: Tensor | None = None,
    gate_scale: float = 2.0,
    shared_weights: Sequence[Tensor] = (),
    backend: str = "auto",
) -> Tensor:
    """An MLP per scenario, each row through the one of its scenario: the trunk without mutual unit and auxiliary.

    With ``gated`` the MLP is a gate, PEPNet's Gate NU (KDD 2023, arXiv 2302.01115): γ sigmoid(z_L) ∘ gated. With
    ``shared_weights`` scenario t's weights are W_t ∘ W_shared, the star topology (STAR, arXiv 2101.11427).

    Args:
        x: (B, d_0), float32, float64, bfloat16 or float16, as the weights.
        scenario: (B,) or (B, 1) of any integer type, in [0, M).
        weights: per layer (M, d_{l-1}, d_l).
        biases: per layer (M, d_l).
        activation: δ after every layer.
        output_activation: δ after the last layer; None: the same. "identity" gives logits.
        gated: None, or (B, d_L), what the gate scales, of the type of ``x``; ``output_activation`` is then None or
            "identity", as the sigmoid stands in its place.
        gate_scale: γ > 0 of the gate.
        shared_weights: per layer (d_{l-1}, d_l), or none. "cpp" forms the products of float32 and float64 where it
            reads them, and never as a whole; elsewhere PyTorch forms them.
        backend: "auto", "reference", "cpp" or "triton".

    Returns:
        (B, d_L).

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`multi_branch`; ValueError for an ``output_activation``
            under a gate.
    """
    if gated is not None:
        checks.check_positive("gate_scale", gate_scale)
        if output_activation not in (None, "identity"):
            raise ValueError(
                f"output_activation must be None or 'identity' with gated, which takes a sigmoid, got "
                f"{output_activation!r}"
            )
        output_activation = "identity"
    output_activation = activation if output_activation is None else output_activation
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_choice("output_activation", output_activation, ACTIVATIONS)
    checks.check_choice("backend", backend, BACKEND_CHOICES)
    device_type = autocast.device_type(x)
    if autocast.is_on(device_type):
        x, gated = autocast.cast(x, device_type), autocast.cast(gated, device_type)
        weights, biases, shared_weights = (
            [autocast.cast(entry, device_type) for entry in entries] for entries in (weights, biases, shared_weights)
        )
    scenario = checks.scenario_ids(scenario)
    checks.check_towers(x, scenario, weights, biases, gated=gated, shared_weights=shared_weights)
    chosen = choose_backend(backend, "grouped_mlp", x, gated=gated is not None)
    with autocast.off(device_type):
        return chosen.grouped_mlp(
            x,
            scenario,
            weights,
            biases,
            activation=activation,
            output_activation=output_activation,
            gated=gated,
            gate_scale=float(gate_scale),
            shared_weights=shared_weights,
        )


def branch_scores(
    x: Tensor,
    scenario: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str = "relu",
    output_activation: str | None = None,
    foreign_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Every scenario's tower on every row; a row trains the tower of its own scenario only.

    S_j(x_n) for all j, with S_j under stop-gradient where j ≠ t: HMoE's label space (CIKM 2020). The gradient of
    entry (n, j), j ≠ t, is not read.

    Args:
        x: (B, d_0), or (B, M, d_0), one view per tower; float32, float64, bfloat16 or float16, as the weights.
        scenario: (B,) or (B, 1) of any integer type, in [0, M).
        weights: per layer (M, d_{l-1}, d_l).
        biases: per layer (M, d_l).
        activation: δ after every layer.
        output_activation: δ after the last layer; None: the same. "identity" gives logits.
        foreign_dtype, backend: as :func:`multi_branch`.

    Returns:
        (B, M, d_L).

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`multi_branch`.
    """
    output_activation = activation if output_activation is None else output_activation
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_choice("output_activation", output_activation, ACTIVATIONS)
    checks.check_choice("backend", backend, BACKEND_CHOICES)
    check_foreign_dtype(foreign_dtype, stop_gradient=True)
    device_type = autocast.device_type(x)
    if autocast.is_on(device_type):
        x = autocast.cast(x, device_type)
        weights, biases = ([autocast.cast(entry, device_type) for entry in entries] for entries in (weights, biases))
    scenario = checks.scenario_ids(scenario)
    checks.check_towers(x, scenario, weights, biases, per_branch=True)
    chosen = choose_backend(backend, "branch_scores", x, foreign_dtype=foreign_dtype)
    with autocast.off(device_type):
        return chosen.branch_scores(
            x,
            scenario,
            weights,
            biases,
            activation=activation,
            output_activation=output_activation,
            foreign_dtype=foreign_dtype,
        )


def expert_outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str = "relu",
    output_activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Every expert's MLP on every row, E_k(x_n) for all k; every row trains every expert.

    What a mixture of experts weighs: MMoE (KDD 2018), PLE (RecSys 2020).

    Args:
        x: (B, d_0), float32, float64, bfloat16 or float16, as the weights.
        weights: per layer (K, d_{l-1}, d_l).
        biases: per layer (K, d_l).
        activation: δ after every layer.
        output_activation: δ after the last layer; None: the same. "identity" gives logits.
        backend: "auto", "reference", "cpp" or "triton".

    Returns:
        (B, K, d_L).

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`multi_branch`.
    """
    output_activation = activation if output_activation is None else output_activation
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_choice("output_activation", output_activation, ACTIVATIONS)
    checks.check_choice("backend", backend, BACKEND_CHOICES)
    device_type = autocast.device_type(x)
    if autocast.is_on(device_type):
        x = autocast.cast(x, device_type)
        weights, biases = ([autocast.cast(entry, device_type) for entry in entries] for entries in (weights, biases))
    checks.check_experts(x, weights, biases)
    chosen = choose_backend(backend, "expert_outputs", x)
    with autocast.off(device_type):
        return chosen.expert_outputs(x, weights, biases, activation=activation, output_activation=output_activation)


@overload
def mutual_unit(
    v: Tensor,
    scenario: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    *,
    score: str = ...,
    temperature: float = ...,
    stop_gradient: bool = ...,
    backend: str = ...,
    return_scores: Literal[False] = ...,
) -> Tensor: ...
@overload
def mutual_unit(
    v: Tensor,
    scenario: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    *,
    score: str = ...,
    temperature: float = ...,
    stop_gradient: bool = ...,
    backend: str = ...,
    return_scores: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def mutual_unit(
    v: Tensor,
    scenario: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    *,
    score: str = ...,
    temperature: float = ...,
    stop_gradient: bool = ...,
    backend: str = ...,
    return_scores: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def mutual_unit(
    v: Tensor,
    scenario: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    *,
    score: str = "ratio",
    temperature: float = 0.1,
    stop_gradient: bool = True,
    backend: str = "auto",
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The mutual unit's own row: M_t = V_t + g_t ∘ Σ_{j≠t} α_tj V_j (SAML, arXiv 2012.08952).

    Args:
        v: (B, M, d) streams of all branches, float32, float64, bfloat16 or float16, as the gate.
        scenario: (B,) or (B, 1) of any integer type, in [0, M).
        gate_weight: U, (M, d, d), or (M, d, 1) for a scalar gate.
        gate_bias: u, (M, d) or (M, 1).
        score, temperature, backend: as :func:`multi_branch`.
        stop_gradient: the foreign streams V_j, j ≠ t, receive exactly zero gradient.
        return_scores: also return row t of α, without gradient.

    Returns:
        M_t (B, d), or with ``return_scores`` (M_t, α (B, M)).

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`multi_branch`.
    """
    checks.check_choice("score", score, checks.SCORES)
    temperature = checks.check_positive("temperature", temperature)
    checks.check_choice("backend", backend, BACKEND_CHOICES)
    device_type = autocast.device_type(v)
    if autocast.is_on(device_type):
        v, gate_weight, gate_bias = (autocast.cast(tensor, device_type) for tensor in (v, gate_weight, gate_bias))
    scenario = checks.scenario_ids(scenario)
    checks.check_same_kind({"v": v, "gate_weight": gate_weight, "gate_bias": gate_bias}, scenario)
    checks.check_shape("v", v, ("B", "M", "d"))
    checks.check_shape("scenario", scenario, (v.shape[0],), " as v has B = {} rows", v.shape[0])
    if v.shape[1] == 0:
        raise ValueError("v must hold at least one branch, got 0")
    checks.check_gate(("gate_weight", "gate_bias"), gate_weight, gate_bias, v.shape[1], v.shape[2])
    chosen = choose_backend(backend, "mutual_unit", v, stop_gradient=stop_gradient)
    with autocast.off(device_type):
        own, alpha = chosen.mutual_unit(
            v,
            scenario,
            gate_weight,
            gate_bias,
            score=score,
            temperature=temperature,
            stop_gradient=stop_gradient,
        )
    return (own, alpha) if return_scores else own


def check_foreign_dtype(foreign_dtype: torch.dtype | None, stop_gradient: bool) -> None:
    """ValueError for a type foreign streams cannot have, or where they are not constants."""
    if foreign_dtype is None:
        return
    if foreign_dtype not in checks.FOREIGN_DTYPES:
        expected = ", ".join(map(str, checks.FOREIGN_DTYPES))
        raise ValueError(f"foreign_dtype must be None or one of {expected}, got {foreign_dtype}")
    if not stop_gradient:
        raise ValueError("foreign_dtype needs stop_gradient=True: only constant foreign streams may be quantised")
