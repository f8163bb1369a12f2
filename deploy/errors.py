"""Everything that can go wrong in ``deploy``, under one root."""


class DeployError(Exception):
    """Root of this package's errors."""


class VersionNotFound(DeployError):
    """No version has that number; the message names those that exist."""


class VersionCorrupt(DeployError):
    """A version's files are not those its manifest lists; the message names the file and what differs."""


class PublishRefused(DeployError):
    """The files offered for publishing cannot become a version. Nothing was published."""


class SigningKeyUnusable(DeployError):
    """A key that the settings name for signing versions cannot be used."""


class TransitionRefused(DeployError):
    """The release may not change that way now. Nothing was changed."""


class StaleGeneration(DeployError):
    """The release changed since it was read. Nothing was changed; look again and decide again."""


class ReleaseUnavailable(DeployError):
    """The release cannot be read or changed: Redis does not answer, or what it holds is no release."""


class LeaseLost(DeployError):
    """Another worker holds the training lease, or this one's has run out; its work must not be published."""
