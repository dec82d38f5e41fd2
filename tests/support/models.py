"""How a model of hypothesis is run: the same histories each time, without a limit of time, and nothing is kept."""

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test


def run_model(make, examples, steps):
    """Let the state machine that ``make()`` returns live through so many histories of so many steps."""
    run_state_machine_as_test(
        make,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
