"""What goes wrong, by kind. Every message names what was given, what was expected and the cure."""


class PruningError(ValueError):
    """A model, plan or budget that cannot be worked with. Nothing was changed."""


class CheckpointError(ValueError):
    """A file that is not a checkpoint this version can load."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""
