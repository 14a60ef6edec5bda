"""A model with a list of towers, fused: the same outputs and gradients, and how much faster.

    python examples/fuse_your_model.py

Put your own model in the place of Ranker: nothing else here knows it.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from saml_kernels import fuse


class Ranker(nn.Module):
    """A shared layer and one tower a scenario."""

    def __init__(self, num_scenarios: int, width: int) -> None:
        super().__init__()
        self.bottom = nn.Linear(width, 128)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
            for _ in range(num_scenarios)
        )

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """x (B, width), scenario (B,) → logits (B,): every tower on every row, then the own one's."""
        hidden = torch.relu(self.bottom(x))
        every = torch.stack([tower(hidden).squeeze(1) for tower in self.towers])
        return every[scenario, torch.arange(len(x))]


class FusedRanker(Ranker):
    """The same with one call in place of the loop."""

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """As before: every row through its own tower only."""
        logits: Tensor = self.towers(torch.relu(self.bottom(x)), scenario)
        return logits.squeeze(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--scenarios", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    x = torch.randn(arguments.rows, arguments.width)
    scenario = torch.randint(0, arguments.scenarios, (arguments.rows,))
    before = Ranker(arguments.scenarios, arguments.width)
    after = FusedRanker(arguments.scenarios, arguments.width)
    after.load_state_dict(copy.deepcopy(before.state_dict()))  # a checkpoint of the list is loaded first
    print(f"fused: {', '.join(fuse(after))}")

    with torch.inference_mode():
        output = relative_error(after(x, scenario), before(x, scenario))
    gradient = relative_error(input_gradient(after, x, scenario), input_gradient(before, x, scenario))
    print(f"relative difference: output {output:.0e}, gradient {gradient:.0e}")
    if max(output, gradient) > 1e-5:
        raise SystemExit("the fused model computes something else")

    for name, run in (("forward", forward), ("forward and backward", step)):
        old, new = take_turns([partial(run, model, x, scenario) for model in (before, after)], arguments.rounds)
        print(f"{name}: {old * 1e3:.2f} ms before, {new * 1e3:.2f} ms after, ratio {old / new:.1f}")


def forward(model: nn.Module, x: Tensor, scenario: Tensor) -> None:
    with torch.inference_mode():
        model(x, scenario)


def step(model: nn.Module, x: Tensor, scenario: Tensor) -> None:
    model.zero_grad()
    model(x, scenario).square().mean().backward()


def input_gradient(model: nn.Module, x: Tensor, scenario: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x, scenario).square().sum(), x)[0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def take_turns(calls: list[Callable[[], None]], rounds: int) -> list[float]:
    """Median seconds of every call; they take turns, so that a busy machine is unfair to none."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 2):
        for call, samples in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if number >= 2:  # the first ones warm up
                samples.append(time.perf_counter() - start)
    return [statistics.median(samples) for samples in seconds]


if __name__ == "__main__":
    main()
