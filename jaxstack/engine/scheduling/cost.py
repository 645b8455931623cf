"""What service costs: the one currency of policies, ledgers and certificates."""

import dataclasses
from typing import Literal, get_args

from jaxstack.runtime.errors import UserError

Charge = Literal["extend", "input"]


@dataclasses.dataclass(frozen=True)
class ServiceCost:
    """`W = extend * n_e + output * n_q` of arXiv 2501.14312, section 3: integers, so that accounts never drift.

    Args:
      extend: price of a prompt token.
      output: price of a generated token.
      charge: "extend" charges the prompt tokens that were not in the prefix cache, "input" all of them.

    Raises:
      UserError: a price that is no integer >= 0 (of `extend`: >= 1), or an unknown `charge`.
    """

    extend: int = 1
    output: int = 2
    charge: Charge = "extend"

    def __post_init__(self) -> None:
        for name, least in (("extend", 1), ("output", 0)):
            check_integer(name, getattr(self, name), least)
        if self.charge not in get_args(Charge):
            raise UserError(f"charge: found {self.charge!r}, expected {' or '.join(get_args(Charge))}")

    def of_prompt(self, prompt_tokens: int, cached: int) -> int:
        """The price of a prompt of which `cached` tokens were in the prefix cache."""
        return self.extend * (prompt_tokens - cached if self.charge == "extend" else prompt_tokens)

    def of_output(self, tokens: int) -> int:
        """The price of generated tokens."""
        return self.output * tokens


def check_integer(name: str, value: object, least: int) -> None:
    """Raises UserError unless `value` is an integer >= `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name}: found {value!r}, expected an integer >= {least}")
