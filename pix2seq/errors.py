"""Exceptions that cross module boundaries."""


class UserError(ValueError):
    """An argument or file of the user is wrong.

    The message is one line that names the flag or file and what is allowed. Entry points print it and exit with code
    2; any other exception is a bug and keeps its traceback.
    """

    def __str__(self) -> str:
        # A data loading worker passes its exceptions on with a traceback in front of the message.
        return " ".join(super().__str__().rsplit("UserError: ", 1)[-1].split())


class Stopped(Exception):
    """Training was asked to stop during an evaluation. All ranks raise it together."""
