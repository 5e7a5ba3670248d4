"""How properties are tried everywhere: the same examples on each run, and no clock, which a busy machine would fail.
And Ctrl-C means what it does to people, also where a shell has started the tests in the background: it has those ignore
it, and so would every command that a test starts."""

import signal

from hypothesis import HealthCheck, settings

settings.register_profile(
    "potluck", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("potluck")
signal.signal(signal.SIGINT, signal.default_int_handler)
