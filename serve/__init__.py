"""OpenAI-compatible completions from the released policy, and the door for feedback."""
