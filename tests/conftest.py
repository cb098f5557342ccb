"""What every test run shares: one thread, and how hard the property tests try."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Read when torch is first imported. The tensors are tiny: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline: machines are slow now and then. Each run of CI is to look somewhere else.
settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
