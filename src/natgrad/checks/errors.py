"""The one kind of error that the command line reports without a traceback."""


class UserError(Exception):
    """Something the user can mend: the message says what came, what was expected and what to do."""
