"""What the natural primal-dual method is compared with, each in its best form, on the same problems, networks and
samples.

Strong-form methods use the forward Laplacian; each player's loss is differentiated by its own parameters only.
"""
