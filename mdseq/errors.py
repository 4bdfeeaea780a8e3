"""The one exception that a user, rather than a developer, is meant to read."""


class UserError(ValueError):
    """A mistake outside the code: an argument, a file, a folder, a setting.

    The message stands alone: what was wrong, where, what is allowed and how to fix it. Command lines print it
    without a traceback and exit with status 2.
    """
