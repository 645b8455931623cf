"""What all floors share: errors, compile accounting, checkpoints, signals, metrics and progress.

Nothing here knows about models, requests or training examples; it is the floor the others stand on.
"""
