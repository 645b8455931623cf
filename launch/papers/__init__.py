"""The papers that `python -m launch.reproduce` knows, one module each with its own flags and a `run(workdir)`."""
