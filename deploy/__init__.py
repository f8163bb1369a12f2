"""Which policy version serves whom: immutable versions on disk, one movable release in Redis."""
