"""A seeded instruction-following world small enough to learn on two cores, and the people in it."""
