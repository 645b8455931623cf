"""Which of an operation's implementations can run here: the one decision that all operations share.

`implementation_for` turns the `implementation=` argument of an operation into the name of a form. The platform is that
of the program being traced: the device of an enclosing abstract mesh (compiling for a machine that is not there), else
that of an enclosing `jax.default_device`, else the default backend.
"""

import importlib
from collections.abc import Callable, Collection
from typing import Any

import jax

# The oldest GPU that Triton's matrix products are written for: Ampere.
_OLDEST_CAPABILITY = (8, 0)

# What `None` tries in turn; "xla" runs anywhere.
_PREFERRED = {"cpu": ("cpu", "xla"), "gpu": ("pallas_gpu", "xla"), "tpu": ("pallas_tpu", "xla")}


def implementation_for(
    op: str,
    asked: str | None,
    forms: Collection[str],
    refuses: Callable[[str], str] = lambda form: "",
) -> str:
    """The form of `op` to run, one of `forms`.

    Args:
      op: the operation's name, for messages.
      asked: what the caller wants; None for the fastest form that can run here, which is "xla" if nothing else is.
      forms: the forms that exist, among "ref", "xla", "cpu", "pallas_gpu", "pallas_tpu" and "interpret".
      refuses: why the operation itself cannot use a form for the arrays at hand, in one line; empty if it can.

    Raises:
      ValueError: no such form, or one that refuses these arrays.
      RuntimeError: `asked` cannot run on this platform.
    """
    if asked is None:
        for form in _PREFERRED.get(platform(), ("xla",)):
            if form in forms and not why_not(form) and not refuses(form):
                return form
        return "xla"
    if asked not in forms:
        raise ValueError(f"{op}: found implementation={asked!r}, expected None or one of {', '.join(forms)}")
    if reason := why_not(asked):
        raise RuntimeError(f"{op}: implementation={asked!r} is not available: {reason}")
    if reason := refuses(asked):
        raise ValueError(f"{op}: implementation={asked!r} cannot be used: {reason}")
    return asked


def pallas_module(package: str, form: str) -> tuple[Any, bool]:
    """The module of `package` that holds the Pallas kernel of `form`, and whether it is to run in Pallas's interpreter.

    "interpret" is the TPU's kernel where the program is for a TPU, else the GPU's. Imported on first use: Pallas takes
    long to load, and a CPU needs none of it.
    """
    kernel = form
    if form == "interpret":
        kernel = "pallas_tpu" if platform() == "tpu" else "pallas_gpu"
    return importlib.import_module(f"{package}.{kernel}"), form == "interpret"


def platform() -> str:
    """ "cpu", "gpu" or "tpu" (or another backend's name): what the program being traced is for."""
    device = _abstract_device() or jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def why_not(form: str) -> str:
    """Why no operation can use `form` on this platform, in one line; empty if nothing here speaks against it."""
    if form == "cpu" and platform() != "cpu":
        return f"it needs a CPU, and this program is for {platform()!r}"
    if form == "pallas_gpu":
        return _why_no_triton()
    if form == "pallas_tpu" and platform() != "tpu":
        return f"it needs a TPU, and this program is for {platform()!r}"
    return ""


def _why_no_triton() -> str:
    if platform() != "gpu":
        return f"it needs an NVIDIA GPU, and this program is for {platform()!r}"
    try:
        from jax.experimental.pallas.triton import CompilerParams  # noqa: F401
    except ImportError as error:
        return f"this version of JAX has no Triton form of Pallas ({error})"
    if _abstract_device() is not None:
        return ""
    found = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
    parts = found.split(".")
    if not all(part.isdecimal() for part in parts) or tuple(map(int, parts)) < _OLDEST_CAPABILITY:
        oldest = ".".join(map(str, _OLDEST_CAPABILITY))
        return f"it needs an NVIDIA GPU of compute capability {oldest} or more, found {found}"
    return ""


def _abstract_device():
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
