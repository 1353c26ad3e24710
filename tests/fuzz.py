"""How the fuzz tests draw their calls."""

from hypothesis import HealthCheck, Phase, settings


def drawing(examples: int, cases: int, *, same_up_to: int) -> settings:
    """Settings of one of `cases` tests that share `examples` calls; up to `same_up_to` they are the same every time."""
    return settings(
        max_examples=-(-examples // cases),
        derandomize=examples <= same_up_to,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # a call is short as it is drawn; to shrink it would take minutes
        suppress_health_check=list(HealthCheck),
    )
