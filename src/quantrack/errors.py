"""The two errors a user may see: one line each, naming the input and the fix."""


class QuantrackError(Exception):
    """Something in the inputs or on the machine stops the work; the program exits with 1."""

    exit_code = 1


class UsageError(QuantrackError):
    """A setting that can be refused before any work starts; the program exits with 2."""

    exit_code = 2
