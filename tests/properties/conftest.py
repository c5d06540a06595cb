"""One profile for all properties: the same examples every run, or ten times as many, drawn anew."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# the suite's fixture seeds once a test; a property seeds PyTorch for every example, from what was drawn
_SHARED = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("reproducible", max_examples=60, derandomize=True, database=None, **_SHARED)
settings.register_profile("thorough", max_examples=600, print_blob=True, **_SHARED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reproducible"))
