"""A batch's rows grouped by scenario, on the device of the ids."""

from torch import Tensor

from saml_kernels import checks
from saml_kernels.backends import BACKEND_CHOICES, choose_backend
from saml_kernels.types import Grouping


def group_by_scenario(scenario: Tensor, num_scenarios: int, *, backend: str = "auto") -> Grouping:
    """Stable grouping of rows by scenario: the order in which every kernel reads a batch.

    Args:
        scenario: (B,) or (B, 1) of any integer type, in [0, num_scenarios), any stride.
        num_scenarios: M, at least 1.
        backend: "auto", "reference" or "cpp".

    Returns:
        Grouping: ``permutation`` (B,), ``inverse`` (B,), ``offsets`` (M + 1,), all int64 on the ids' device.

    Raises:
        TypeError: ids that are no tensor of integers.
        ValueError: ids that are not one a row; the first id out of range, with its row (on a GPU a device
            assertion, so that the call need not wait for the device).
        BackendUnavailable: a backend named explicitly cannot run this here.
    """
    checks.check_choice("backend", backend, BACKEND_CHOICES)
    scenario = checks.scenario_ids(scenario)
    num_scenarios = checks.check_integer("num_scenarios", num_scenarios, 1)
    return choose_backend(backend, "group_by_scenario", scenario).group_by_scenario(scenario, num_scenarios)
