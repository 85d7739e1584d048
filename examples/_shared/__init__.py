"""What the examples share, so that each script shows its method and little else."""
