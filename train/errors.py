"""Everything that can go wrong in ``train``, under one root."""


class TrainError(Exception):
    """Root of this package's errors."""


class ModelUnusable(TrainError):
    """A model directory that cannot be loaded as what it should be; the message names the directory and why."""


class DatasetUnusable(TrainError):
    """Training data that cannot be learnt from: empty, too long for the model, or malformed."""


class ResumePointUnusable(TrainError):
    """A resume point that is damaged or belongs to another run; removing the file starts the run anew."""


class TrainingDiverged(TrainError):
    """A loss or a weight is no longer finite; nothing was saved after the last good iteration."""
