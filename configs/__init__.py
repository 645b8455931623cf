"""Configurations as Python files: `get_config()` returns the frozen dataclass that the job's library entry takes."""
