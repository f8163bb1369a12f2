"""What versions are measured by: win rates, probes, triggers, calibration, and how reports show them."""
