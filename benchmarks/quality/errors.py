"""What ends the command with a message and no traceback."""


class TrialError(Exception):
    """Data, arguments or a results file are not what the trial needs."""
