"""The one exception a user's mistake raises."""


class UserError(ValueError):
    """Something outside the program is wrong: a flag, a file, a configuration value, a request.

    The message is one line that names the thing, what was found and what was expected. Launchers print it without a
    traceback and exit with `exit_code`; the server turns it into an OpenAI error object.
    """

    def __init__(self, message: str, *, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code
