"""Fixtures of several modules: a served run and its server, one for each module."""

from __future__ import annotations

from tests.integration.risk_process import run, server  # noqa: F401
