"""The one error that stands for a mistake of the user."""


class UserError(ValueError):
    """A flag or file of the user's is wrong. The message is one line: it names the flag or file and what is allowed.

    Entry points print it and exit with code 2; any other error is a bug and keeps its traceback.
    """

    def __str__(self) -> str:
        # A data loading process hands its errors over with a traceback in front.
        return " ".join(super().__str__().rsplit("UserError: ", 1)[-1].split())
