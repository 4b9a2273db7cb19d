"""The one exception that is meant for the person at the terminal."""


class UserError(Exception):
    """A mistake outside the program: one sentence saying what, where and what to do; shown without a traceback."""
