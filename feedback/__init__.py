"""What people said about completions, kept durably in Redis, and what it says about the versions."""
