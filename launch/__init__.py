"""Jobs to type: `python -m launch.NAME --config=configs/....py --config.field=value --workdir=DIR`.

Each file is thin: it declares flags, calls the library, and prints the job's summary as the last line of stdout.
`job.py` holds what they share: configuration files with overrides, one-line errors, exit codes and the summary.
"""
