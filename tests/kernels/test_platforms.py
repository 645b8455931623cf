"""Which implementation is chosen, on this platform and on those that are not here."""

import pytest
from lowering import DEVICES, tracing_for

from kernels.platforms import implementation_for, platform, why_not

ALL = ("ref", "xla", "cpu", "pallas_gpu", "pallas_tpu", "interpret")


@pytest.mark.parametrize("device", sorted(DEVICES))
def test_none_follows_the_device_the_program_is_traced_for(device):
    with tracing_for(device):
        kind = DEVICES[device].platform
        assert platform() == kind
        assert implementation_for("op", None, ALL) == f"pallas_{kind}"
        assert implementation_for("op", None, ("ref", "xla", "cpu")) == "xla"
        assert (
            implementation_for("op", None, ALL, lambda form: "odd shape" if form.startswith("pallas") else "") == "xla"
        )
        with pytest.raises(RuntimeError, match=r"^op: implementation='cpu' is not available: it needs a CPU"):
            implementation_for("op", "cpu", ALL)


def test_here():
    assert platform() == "cpu"
    assert implementation_for("op", None, ALL) == "cpu"
    assert implementation_for("op", None, ("ref", "xla")) == "xla"
    assert implementation_for("op", None, ALL, lambda form: "no compiler" if form == "cpu" else "") == "xla"
    for form in ("ref", "xla", "cpu", "interpret"):
        assert implementation_for("op", form, ALL) == form
    for form in ("pallas_gpu", "pallas_tpu"):
        assert "this program is for 'cpu'" in why_not(form)
        with pytest.raises(RuntimeError, match=f"^op: implementation='{form}' is not available: it needs"):
            implementation_for("op", form, ALL)
    with pytest.raises(ValueError, match="found implementation='fast', expected None or one of ref, xla"):
        implementation_for("op", "fast", ALL)
    with pytest.raises(ValueError, match="cannot be used: odd shape"):
        implementation_for("op", "ref", ALL, lambda form: "odd shape")
