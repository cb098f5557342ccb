"""What the tests of the conformance suite share."""

from __future__ import annotations

from pathlib import Path

import pytest

from loudmerge.conformance.cases import Suite
from tests.unit.conformance.world import make_suite


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """The small suite of `world`."""
    return make_suite(tmp_path / "suite")
