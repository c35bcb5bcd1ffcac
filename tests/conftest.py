"""How the tests run: hypothesis is quick and repeatable unless told to look harder.

``HYPOTHESIS_PROFILE=deep`` tries other examples on every run, and many more of them; so does
hypothesis' own ``--hypothesis-profile deep``.
"""

from hypothesis import HealthCheck, settings

from p2pcache.config import process_environment

# Two busy cores make single examples slow now and then: time is not what these tests judge.
_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

settings.register_profile("fast", _COMMON, max_examples=20, derandomize=True, database=None)
settings.register_profile("deep", _COMMON, max_examples=3000)
settings.load_profile(process_environment().get("HYPOTHESIS_PROFILE", "fast"))
