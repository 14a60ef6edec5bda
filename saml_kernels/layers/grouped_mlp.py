"""A tower per scenario as a layer."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels import checks, functional
from saml_kernels.activations import ACTIVATIONS
from saml_kernels.layers.common import (
    STARTS,
    Layer,
    check_options,
    check_widths,
    describe,
    entries,
    init_linear,
    start_alike,
)
from saml_kernels.layers.convert import freeze_as, linear_entries, one_activation, read_towers, state_of


class GroupedMLP(Layer):
    """One MLP per scenario, each row through its own: :func:`saml_kernels.grouped_mlp` with its parameters.

    Args:
        num_scenarios: M.
        in_dim: d_0; 0 is allowed.
        hidden_dims: d_1..d_L.
        activation: after every layer.
        output_activation: after the last layer; None: the same. "identity" gives logits.
        backend, device, dtype: as :class:`MultiBranchMLP`.
        init: "independent", every tower drawn on its own, or "shared", all start as tower 0.
        bias: False: no layer adds one.

    Raises:
        TypeError, ValueError: options and sizes that cannot be used.
    """

    def __init__(
        self,
        num_scenarios: int,
        in_dim: int,
        hidden_dims: Sequence[int],
        activation: str = "relu",
        output_activation: str | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init: str = "independent",
        bias: bool = True,
    ) -> None:
        super().__init__()
        num_scenarios = checks.check_integer("num_scenarios", num_scenarios, 1)
        in_dim = checks.check_integer("in_dim", in_dim, 0)
        hidden_dims = check_widths("hidden_dims", hidden_dims)
        check_options(activation, backend)
        if output_activation is not None:
            checks.check_choice("output_activation", output_activation, ACTIVATIONS)
        checks.check_choice("init", init, STARTS)
        self.num_scenarios = num_scenarios
        self.in_dim = in_dim
        self.hidden_dims = hidden_dims
        self.activation = activation
        self.output_activation = output_activation
        self.backend = backend
        self.init = init
        self.bias = bias
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(num_scenarios, rows, columns, device=device, dtype=dtype))
            for rows, columns in zip((in_dim, *hidden_dims), hidden_dims, strict=False)
        )
        self.biases = nn.ParameterList(
            nn.Parameter(torch.empty(num_scenarios, d, device=device, dtype=dtype)) for d in hidden_dims if bias
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights, from torch's global generator."""
        for weight, bias in zip(self.weights, self.all_biases(), strict=True):
            init_linear(weight, bias)
        if self.init == "shared":
            start_alike(*self.weights, *self.biases)

    @property
    def layer_activations(self) -> list[str]:
        """The activation of every layer."""
        last = self.activation if self.output_activation is None else self.output_activation
        return [self.activation] * (len(self.hidden_dims) - 1) + [last]

    def all_biases(self) -> list[Tensor]:
        """(M, d_l) of every layer: zeros where there are none."""
        return entries(self.biases) if self.bias else [weight.new_zeros(weight.shape[::2]) for weight in self.weights]

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """x (B, d_0), scenario (B,) → (B, d_L)."""
        return functional.grouped_mlp(
            x,
            scenario,
            entries(self.weights),
            self.all_biases(),
            activation=self.activation,
            output_activation=self.output_activation,
            backend=self.backend,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def tower(self, index: int, x: Tensor) -> Tensor:
        """Tower ``index`` on all rows, as nn.Linear and activations compute it: x (..., d_0) → (..., d_L)."""
        for weight, bias, name in zip(self.weights, self.all_biases(), self.layer_activations, strict=True):
            x = ACTIVATIONS[name].function(F.linear(x, weight[index].t(), bias[index] if self.bias else None))
        return x

    def extra_repr(self) -> str:
        return describe(self, "num_scenarios in_dim hidden_dims activation output_activation backend init bias")

    @classmethod
    def from_towers(cls, towers: Iterable[nn.Module], backend: str = "auto") -> "GroupedMLP":
        """The same function as a list of towers, tower k serving scenario k; parameters are copied.

        Args:
            towers: nn.Sequential, or modules whose forward runs others one after the other, of nn.Linear and
                activations, all alike: an activation after every layer but perhaps the last, the same one everywhere; a
                bias everywhere or nowhere; dropout only with p = 0. What is frozen in all stays frozen.
            backend: as of the class.

        Raises:
            TypeError, ValueError: towers that are not of this kind, with what stands in the way;
                :class:`GroupedSequential` takes more.
        """
        modules = list(towers)
        first = read_towers(modules)[0]
        activation, output_activation = one_activation(first)
        weight = first.linears[0].weight
        layer = cls(
            len(modules),
            first.widths[0],
            first.widths[1:],
            activation=activation,
            output_activation=output_activation,
            backend=backend,
            device=weight.device,
            dtype=weight.dtype,
            bias=first.linears[0].bias is not None,
        )
        entries = linear_entries(first)
        layer.load_state_dict(state_of(entries, [tower.state_dict() for tower in modules]))
        freeze_as(layer, entries, modules[0])
        return layer.train(modules[0].training)

    def to_towers(self) -> nn.ModuleList:
        """The same function as M nn.Sequential of nn.Linear and activations; parameters are copied."""
        towers = nn.ModuleList()
        for k in range(self.num_scenarios):
            modules: list[nn.Module] = []
            for weight, bias, name in zip(self.weights, self.all_biases(), self.layer_activations, strict=True):
                like = {"device": weight.device, "dtype": weight.dtype}
                linear = nn.Linear(weight.shape[1], weight.shape[2], bias=self.bias, **like)
                with torch.no_grad():
                    linear.weight.copy_(weight[k].t())
                    if self.bias:
                        linear.bias.copy_(bias[k])
                modules += [linear, *([ACTIVATIONS[name].module()] if name != "identity" else [])]
            towers.append(nn.Sequential(*modules))
        return towers
