"""The InstructGPT recipe: supervised fine-tuning, a reward model from rankings, PPO-ptx."""
