"""What every stage runs on: devices, processes, the optimizer, resume points, progress."""
