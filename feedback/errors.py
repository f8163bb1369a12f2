"""Everything that can go wrong in ``feedback``, under one root."""


class FeedbackError(Exception):
    """Root of this package's errors."""


class CorruptRecord(FeedbackError):
    """A stored record's bytes are not what was acknowledged; it is quarantined, never trained on."""


class IdempotencyKeyReuse(FeedbackError):
    """The idempotency key was used before with another body."""


class StoreUnavailable(FeedbackError):
    """Redis does not answer, is full, or is not configured to be durable. Nothing was acknowledged."""


class EmbeddedRedisError(FeedbackError):
    """The embedded redis-server could not be started or joined."""


class KeyRefused(FeedbackError):
    """An API key cannot be made as asked. Nothing was made."""


class KeyNotFound(FeedbackError):
    """No single API key has that id."""
