"""The one kind of error a user can cause."""


class LLMPruneError(ValueError):
    """Bad input. Its message is one sentence: what was given, what was expected, what to do.

    The command line prints it without a traceback and exits with code 2; every other exception is a
    defect of ours and keeps its traceback.
    """
