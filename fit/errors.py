"""The one exception of this package."""


class FitError(ValueError):
    """The table or the request cannot give a fit: one line that says what is wrong, where, and what would be right."""
