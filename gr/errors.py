"""The one exception that stands for a mistake of the user's, and words for those of libraries."""


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong, where, and what would be right.

    Programs print it without a traceback and exit with code 2.
    """


def first_line(error: BaseException) -> str:
    """What an error of a library says, cut to one line; its type's name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
