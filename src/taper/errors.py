"""Errors that reach a user: what was wrong, the value, the rule, and the way out."""

from __future__ import annotations


class TaperError(Exception):
    """Base of every error that Taper raises on purpose.

    Args:
        message: one line, no full stop: what was wrong, with the value and the rule.
        hint: one line: the way out; empty where there is none.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(TaperError):
    """A request or an option that can never be right."""

    exit_code = 2


class ModelNotFoundError(TaperError):
    """The named file or folder is not there, or is no model."""

    exit_code = 3


class DoesNotFitError(TaperError):
    """Memory, disk or context length is too small for what was asked."""

    exit_code = 4


class CorruptFileError(TaperError):
    """A model file's bytes contradict its own description."""

    exit_code = 5
