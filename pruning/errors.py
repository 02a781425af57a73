"""The toolkit's errors. Every message names what was given, what was expected, and the cure."""


class UserError(ValueError):
    """An error in the user's input; the command line then ends with exit code 2."""


class PruningError(UserError):
    """An invalid model, plan, budget or setting. Nothing was changed.

    >>> from pruning import Budget
    >>> Budget(macs="150%")
    Traceback (most recent call last):
    pruning.errors.PruningError: macs budget '150%': expected a percentage above 0 and at most 100
    """


class ExportError(PruningError):
    """A network that cannot be exported or quantized, or an exported file that does not run."""


class CheckpointError(UserError):
    """A file that this version cannot load as a checkpoint, or that cannot be written."""


class GroupsLeftOut(UserWarning):
    """Groups keep all channels, because the check of equivalence failed with them."""


class TrainingDiverged(UserError):
    """The loss is no longer finite; checkpoints written before are unchanged."""
