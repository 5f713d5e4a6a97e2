"""The one exception that stands for a mistake of the user's."""


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong, where, and what would be right.

    Programs print it without a traceback and exit with code 2.
    """
