"""Progress on stderr: how far, how fast, how long to go."""

import sys
from types import TracebackType
from typing import TextIO

import tqdm


class Progress:
    """A progress bar with rate and ETA. Where stderr is not a terminal it prints a line every ten seconds instead.

    Args:
      total: number of units, or None when unknown.
      description: what is being done.
      unit: name of one unit.
      initial: units already done when a job continues; they do not count into the rate.
      enabled: False prints nothing.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        *,
        unit: str = "step",
        initial: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
    ):
        stream = stream or sys.stderr
        self._bar = tqdm.tqdm(
            total=total,
            desc=description,
            unit=unit,
            initial=initial,
            disable=not enabled,
            file=stream,
            mininterval=0.2 if stream.isatty() else 10.0,
            dynamic_ncols=stream.isatty(),
        )

    def advance(self, units: int = 1) -> None:
        """Counts `units` more."""
        self._bar.update(units)

    def figures(self, **values: object) -> None:
        """Shows `name=value` behind the bar from its next refresh on."""
        shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
        self._bar.set_postfix(shown, refresh=False)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if not self._bar.disable:
            self._bar.write(line, file=self._bar.fp)

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
