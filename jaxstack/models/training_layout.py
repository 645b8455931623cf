"""A decoder arranged for training steps on one device."""

from flax import nnx

from jaxstack.models.decoder import MLP, Decoder
from jaxstack.models.linear import Linear


def fuse_for_training(decoder: Decoder) -> Decoder:
    """A decoder with the same parameters that runs the fastest forms of everything that has gradients: on a CPU,
    compiled kernels for what lies between the products, where XLA passes over wide arrays with one thread.

    XLA cannot spread those over a mesh of devices; there the decoder stays as it is.
    """
    decoder = nnx.merge(*nnx.split(decoder))
    for _, module in nnx.iter_modules(decoder):
        if isinstance(module, Linear | MLP):
            module.implementation = None
    return decoder
