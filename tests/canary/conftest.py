"""Loads the canary's pytest plugin where loudmerge is on the path but not installed."""

from __future__ import annotations

import pytest

from loudmerge.canary import plugin


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.has_plugin(plugin.NAME):
        pluginmanager.register(plugin, plugin.NAME)
