"""What trains a model: AdamW for the network and dense tables, and what the other engines of tables bring."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saml_rec.models.tables import FusedTable, RowwiseAdagrad, SparseTable, TableOptions
from saml_rec.training.decay import without_decay
from saml_rec.training.scenario_parameters import decaying, of_scenarios, pull_together


class Optimizers:
    """All optimizers of a model, as one.

    Args:
        model: on the device where it is trained.
        learning_rate, weight_decay: of AdamW; :mod:`saml_rec.training.decay` says which parameters are decayed. Tables
            that are not dense have neither.
        tables: how the model keeps its tables.
        scenario_rate: learning rate of the parameters of single scenarios, as a share of ``learning_rate``
            (:mod:`saml_rec.training.scenario_parameters`).
        scenario_decay: of what sets the parameters of single scenarios apart from their mean, but for biases (there).
        num_scenarios: M; only where there is a ``scenario_decay``.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        weight_decay: float,
        tables: TableOptions,
        scenario_rate: float = 1.0,
        scenario_decay: float = 0.0,
        num_scenarios: int = 1,
    ) -> None:
        sparse = {name: table for name, table in model.named_modules() if isinstance(table, SparseTable)}
        taken = {id(table.weight) for table in sparse.values()}
        named = {name: each for name, each in model.named_parameters() if id(each) not in taken}
        exempt, single = set(without_decay(model)), set(of_scenarios(model))
        network: dict[tuple[bool, bool], dict[str, Any]] = {}
        for name, parameter in named.items():
            own: dict[str, Any] = {"weight_decay": 0.0} if name in exempt else {}
            own |= {"lr": learning_rate * scenario_rate} if name in single else {}
            group = network.setdefault((name in exempt, name in single), {"params": [], **own})
            group["params"].append(parameter)
        self._pulled = [named[name] for name in decaying(model) if name in named] if scenario_decay else []
        self._pull = learning_rate * scenario_decay
        self._num_scenarios = num_scenarios
        # fused: a quarter of the time on embedding tables of millions of numbers.
        self._all: dict[str, torch.optim.Optimizer] = {}
        # A fitted model has none.
        if network:
            groups = list(network.values())
            self._all["network"] = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=True)
        of_tables = [{"params": [table.weight], "lr": table.rate} for table in sparse.values()]
        # Per table, what row-wise Adagrad has summed up: the same in all engines.
        self._squares: dict[str, tuple[FusedTable | None, Tensor]] = {}
        if of_tables and tables.optimizer == "adam":
            self._all["tables"] = torch.optim.SparseAdam(of_tables, lr=tables.rate)
        elif of_tables:
            rowwise = RowwiseAdagrad(of_tables, lr=tables.rate)
            self._squares = {name: (None, rowwise.squares_of(table.weight)) for name, table in sparse.items()}
            self._all["tables"] = rowwise
        self._parameters = [*named.values(), *(table.weight for table in sparse.values())]
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        fused = {name: table for name, table in model.named_modules() if isinstance(table, FusedTable)}
        self._squares |= {name: (table, table.squares) for name, table in fused.items()}

    def zero_grad(self) -> None:
        # In place of every optimizer's own, of which what each one looks at and records takes ten times as long.
        for parameter in self._parameters:
            parameter.grad = None

    def step(self) -> None:
        """One update; fused tables had theirs in backward."""
        for optimizer in self._all.values():
            optimizer.step()
        for parameter in self._pulled:
            pull_together(parameter, self._num_scenarios, self._pull)

    def state_dict(self) -> dict[str, Any]:
        """Tensors are not copied. Of a table in several processes the first has all; all of them have to ask."""
        return {
            "optimizers": {
                name: optimizer.state_dict()
                for name, optimizer in self._all.items()
                if not isinstance(optimizer, RowwiseAdagrad)
            },
            "squares": {
                name: squares if table is None else table.processes.to_first(squares, table.num_rows)
                for name, (table, squares) in self._squares.items()
            },
        }

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the state that this process has."""
        for optimizer in self._all.values():
            for parameter, state in optimizer.state.items():
                name = self._names[id(parameter)]
                yield from ((f"{key} of {name}", tensor) for key, tensor in state.items())
        yield from ((f"squares of {name}", squares) for name, (_, squares) in self._squares.items())

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` gave, of the same engine of tables or another of the same optimizer.

        Raises:
            ValueError: a tensor has another shape than what it belongs to.
            Exception: of many kinds, for anything else.
        """
        for name, optimizer in self._all.items():
            if not isinstance(optimizer, RowwiseAdagrad):
                optimizer.load_state_dict(saved["optimizers"][name])
                # torch takes any shape, and fails at the first step.
                for parameter, state in optimizer.state.items():
                    for key, tensor in state.items():
                        if tensor.dim() and tensor.shape != parameter.shape:
                            raise ValueError(f"{key} is {tuple(tensor.shape)} of {tuple(parameter.shape)} weights")
        for name, (table, squares) in self._squares.items():
            shared = table is not None and table.processes.are_several
            if not shared and (given := saved["squares"][name].shape) != squares.shape:
                raise ValueError(f"squares of {name} are {tuple(given)}, not {tuple(squares.shape)}")
            if table is None:
                squares.copy_(saved["squares"][name])
            else:
                table.processes.fill_from_first(squares, saved["squares"][name])
