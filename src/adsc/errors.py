"""Errors that a user can cause: one line that says what was given, what is allowed and what to do."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input. The command line prints its one line and exits with status 2."""


class UnsupportedModelError(InputError):
    """A model that adsc cannot serve exactly, and so refuses."""
