"""Models that travel inside the package, each a Hugging Face folder with a MODEL.md that says how it was made.

countdown/    a reasoning model for Countdown-3, trained from scratch by `python -m launch.make_embedded_model`
"""

from pathlib import Path

from jaxstack.runtime.errors import UserError


def embedded_model(name: str = "countdown") -> Path:
    """The folder of an embedded model, in a checkout and in an installed wheel alike.

    Raises:
      UserError: no model of this name is embedded; the message lists those that are.
    """
    home = Path(__file__).resolve().parent
    known = sorted(file.parent.name for file in home.glob("*/config.json"))
    if name not in known:
        raise UserError(f"embedded model {name!r} is unknown; embedded are {', '.join(known) or 'none'}")
    return home / name
