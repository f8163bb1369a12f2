"""A round of the worker: from the feedback log to a dataset, two trainings and a published version."""
