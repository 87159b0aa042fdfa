"""The one exception that stands for a user's mistake: the command line prints it as one line and exits with status 2.

Belongs here: that class and nothing else. A bug must never be wrapped in it: bugs keep their traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. The message names the argument or file, the value and the remedy."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The gist of a library's exception, to be quoted inside a `UserError`: its first non-empty line, at most `limit`
    characters."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = text or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
