"""The error of the command line."""

__all__ = ["CommandError"]


class CommandError(Exception):
    """What the user asked for cannot be done: the message goes to stderr and the exit status is 2."""
