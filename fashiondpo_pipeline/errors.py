"""The one exception that is meant for the person at the terminal."""

import errno
import os


class UserError(Exception):
    """A mistake outside the program: one sentence saying what, where and what to do; shown without a traceback."""


def disk_is_full(problem: BaseException) -> bool:
    """Whether a writer failed for want of room: by the system's number, or its words where a library hides the number."""
    return getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(problem)
