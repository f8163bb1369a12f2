"""The parts of one PPO iteration: episodes and all that is known of them, updates, alarms, resume point."""
