"""The one exception for what a person can put right."""

__all__ = ['TimmHamError']


class TimmHamError(ValueError):
    """A mistake that its message names in one line, with the next step. Commands print it and exit with status 1."""
