"""How properties are tried everywhere: the same examples on each run, and no clock, which a busy machine would fail."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "potluck", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("potluck")
