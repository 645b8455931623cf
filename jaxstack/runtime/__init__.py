"""What all floors share: errors, compile accounting, checkpoints, signals, metrics and progress; the memory spaces of a
device, the profile of a machine, and a device with its link emulated on a CPU.

Nothing here knows about models, requests or training examples; it is the floor the others stand on.
"""
