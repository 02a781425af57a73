"""What goes wrong, by kind. Every message names what was given, what was expected and the cure."""


class UserError(ValueError):
    """Something given from outside cannot be worked with; commands end with exit code 2."""


class PruningError(UserError):
    """A model, plan, budget or setting that cannot be worked with. Nothing was changed."""


class ExportError(PruningError):
    """A network that cannot be exported or quantized, or an exported file that cannot be run."""


class CheckpointError(UserError):
    """A file that is not a checkpoint this version can load, or that cannot be written."""


class TrainingDiverged(UserError):
    """The loss is no longer a finite number; checkpoints written before are as they were."""
