"""What to rent: plans to begin with, for `python -m launch.allocate`."""
