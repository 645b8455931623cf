"""The parts of `launch/papers/pie.py`: what is simulated, what is measured on an emulated machine, the report and the
pictures.
"""
