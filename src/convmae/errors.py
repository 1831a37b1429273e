"""The one exception for mistakes that a user can mend.

Its message is a single line that says what is wrong and what to do; the command line prints it and exits with 2.
"""


class UserError(ValueError):
    """A wrong input or setting; the message names the cure."""
