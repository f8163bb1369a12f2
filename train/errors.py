"""Everything that can go wrong in ``train``, under one root."""


class TrainError(Exception):
    """Root of this package's errors."""


class ModelUnusable(TrainError):
    """A model directory that cannot be loaded as what it should be; the message names the directory and why."""


class DeviceUnusable(TrainError):
    """What was asked to compute on is not there, or does not fit the work; the message names the setting."""


class DatasetUnusable(TrainError):
    """Training data that cannot be learnt from: empty, too long for the model, or malformed."""


class ResumePointUnusable(TrainError):
    """A resume point that is damaged or belongs to another run; removing the file starts the run anew."""


class TrainingDiverged(TrainError):
    """A loss or a weight is no longer finite; nothing was saved after the last good iteration."""


class AlarmRaised(TrainError):
    """A run whose numbers sound training rules out was stopped; its resume point stands, and the message says why."""
