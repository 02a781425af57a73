"""The toolkit's errors. Every message names what was given, what was expected, and the cure."""


class UserError(ValueError):
    """An error in what the user gave; a command that raises it ends with exit code 2."""


class PruningError(UserError):
    """A model, plan, budget or setting that the toolkit cannot work with. Nothing was changed."""


class ExportError(PruningError):
    """A network that cannot be exported or quantized, or an exported file that cannot be run."""


class CheckpointError(UserError):
    """A file that is not a checkpoint that this version can load, or that cannot be written."""


class TrainingDiverged(UserError):
    """The loss is no longer finite; checkpoints written before are unchanged."""
