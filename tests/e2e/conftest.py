"""What the end-to-end tests share: how Python collects garbage while they run."""

from __future__ import annotations

import gc
import os

# transformers 5 reads a model's tensors in four threads. Those of tiny models only wait for each other.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")

# What is imported from here on stays.
gc.disable()


def pytest_collection_finish() -> None:
    """Leaves out of each collection what the imports made, which stays: 800,000 objects.

    A tiny model makes thousands, so that the usual thresholds are passed many times in each test.
    """
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()
