"""Kernels in C++ that ship as source: compiled on first use, known to XLA under a name."""

import ctypes
import logging
import threading
from pathlib import Path

import jax

from kernels import build

_lock = threading.Lock()


class NativeKernel:
    """One XLA FFI handler.

    Args:
      source: its C++ file.
      symbol: the handler's name in the compiled library.
      target: what XLA calls it.
    """

    def __init__(self, source: Path, *, symbol: str, target: str):
        self.source, self.symbol, self.target = source, symbol, target
        self._why_not: str | None = None

    def why_not(self) -> str:
        """Why the kernel cannot be used in this process, in one line; empty if it can. Builds it on the first call."""
        with _lock:
            if self._why_not is None:
                self._why_not = self._register()
            return self._why_not

    def _register(self) -> str:
        try:
            library = build.shared_library(self.source)
            handler = load(library, self.symbol)
        except build.BuildError as error:
            logging.getLogger(__name__).warning("%s falls back to XLA's slower form: %s", self.target, error)
            return str(error)
        jax.ffi.register_ffi_target(self.target, handler, platform="cpu")
        return ""


def load(library: Path, symbol: str) -> object:
    """The FFI handler `symbol` of a compiled library, as `jax.ffi.register_ffi_target` takes it.

    Raises:
      build.BuildError: it cannot be loaded.
    """
    try:
        return jax.ffi.pycapsule(getattr(ctypes.CDLL(str(library)), symbol))
    except (OSError, AttributeError) as error:
        raise build.BuildError(f"{library} does not load: {' '.join(str(error).split())}") from error
