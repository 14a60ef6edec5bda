"""What trains a model: AdamW for the network and dense tables, and what the other engines of tables bring."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from saml_rec.models.tables import FbgemmTable, RowwiseAdagrad, SparseTable, TableOptions


class Optimizers:
    """All optimizers of a model, as one.

    Args:
        model: on the device where it is trained.
        learning_rate, weight_decay: of AdamW. Tables that are not dense have neither.
        tables: how the model keeps its tables.
    """

    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float, tables: TableOptions) -> None:
        sparse = [module.weight for module in model.modules() if isinstance(module, SparseTable)]
        taken = {id(weight) for weight in sparse}
        network = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        # fused: a quarter of the time on embedding tables of millions of numbers.
        self._all: dict[str, torch.optim.Optimizer] = {
            "network": torch.optim.AdamW(network, lr=learning_rate, weight_decay=weight_decay, fused=True)
        }
        if sparse and tables.optimizer == "adam":
            self._all["tables"] = torch.optim.SparseAdam(sparse, lr=tables.rate)
        elif sparse:
            self._all["tables"] = RowwiseAdagrad(sparse, lr=tables.rate)
        self._parameters = [*network, *sparse]
        self._fused = {name: module for name, module in model.named_modules() if isinstance(module, FbgemmTable)}

    def zero_grad(self) -> None:
        # In place of every optimizer's own, of which what each one looks at and records takes ten times as long.
        for parameter in self._parameters:
            parameter.grad = None

    def step(self) -> None:
        """One update; fused tables had theirs in backward."""
        for optimizer in self._all.values():
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Tensors of fused tables are not copied."""
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._all.items()},
            "fused": {name: table.squares for name, table in self._fused.items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        for name, optimizer in self._all.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        for name, table in self._fused.items():
            table.squares.copy_(saved["fused"][name])
