"""The one exception for anything a user can get wrong; programs print it as a sentence and exit with 2."""


class UserError(ValueError):
    """Bad input. The message is one sentence that names the value and the remedy."""
