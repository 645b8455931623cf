"""Asynchronous, atomic checkpoints of a pytree of arrays and a little JSON, through orbax.

Layout: `folder/<step>/` holds `arrays/` (tensorstore) and `metadata` (JSON). Orbax writes into
`<step>.orbax-checkpoint-tmp` and renames when all is on disk, so a directory with a bare number is complete whenever
the process is killed. What a killed or failing disk can still spoil is found out at restore: an unreadable checkpoint
is set aside in `folder.corrupt/` and the one before it is taken.
"""

import dataclasses
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxstack.runtime.errors import UserError

_log = logging.getLogger(__name__)


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    """Orbax tells a dozen things a save through absl's logger, on the terminal of whoever runs a job. Warnings pass."""
    return record.levelno >= logging.WARNING or "orbax" not in record.pathname


class SaveFailed(RuntimeError):
    """A checkpoint could not be written (disk full, folder read-only). The state in memory is untouched."""


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the union of the `last` newest, every multiple of `every` steps, and the `best` by
    metric."""

    last: int = 2
    every: int | None = None
    best: int = 0

    def __post_init__(self) -> None:
        # Two, because the newest may turn out to be unreadable.
        if self.last < 1:
            raise UserError(f"keep.last={self.last}: expected at least 1")
        if self.every is not None and self.every < 1:
            raise UserError(f"keep.every={self.every}: expected at least 1, or none")
        if self.best < 0:
            raise UserError(f"keep.best={self.best}: expected 0 or more")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back."""

    step: int
    arrays: Any
    metadata: dict[str, Any]


class Checkpointer:
    """Saves `(arrays, metadata)` at a step without blocking, and restores the newest one that can be read.

    Args:
      folder: where the step directories go; created when missing.
      keep: which checkpoints stay.

    Raises:
      UserError: the folder cannot be created or written.
    """

    def __init__(self, folder: str | Path, keep: Keep | None = None):
        # Imported here: orbax takes seconds to import, and only jobs that checkpoint should wait for it.
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        self._ocp = ocp
        logging.getLogger("absl").addFilter(_not_orbax_chatter)  # adding it twice is adding it once
        self.folder = Path(folder).absolute()
        keep = keep or Keep()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"checkpoint folder {str(self.folder)!r} cannot be written: {error.strerror}") from error
        if not os.access(self.folder, os.W_OK):
            raise UserError(f"checkpoint folder {str(self.folder)!r} cannot be written: permission denied")
        preserve: list[Any] = [policies.LatestN(keep.last)]
        if keep.every:
            preserve.append(policies.EveryNSteps(keep.every))
        if keep.best:
            preserve.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["metric"],
                    reverse=True,  # orbax keeps the end of the sorted list; the lowest metric is to stand there
                    n=keep.best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._best = bool(keep.best)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(preserve),
                # Leftovers of a killed save are worthless; the next start removes them.
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, arrays: Any, metadata: Mapping[str, Any], *, metric: float | None = None) -> None:
        """Starts writing a checkpoint, after the previous one is done. A step that is already saved is left as it is.

        The arrays are copied to the host before this returns, so the caller may donate them to the next step at once.

        Args:
          arrays: pytree of `jax.Array` or `numpy.ndarray`.
          metadata: JSON-ready mapping.
          metric: the lower the better, for `Keep.best`.

        Raises:
          SaveFailed: this save could not be started, or the previous one failed meanwhile.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        args = self._ocp.args
        arrays = jax.tree.map(_on_host, arrays)
        try:
            self._manager.save(
                step,
                args=args.Composite(arrays=args.StandardSave(arrays), metadata=args.JsonSave(dict(metadata))),
                metrics={"metric": float(metric)} if self._best and metric is not None else None,
                force=True,
            )
        except (
            Exception
        ) as error:  # orbax and tensorstore raise OSError, ValueError and XlaRuntimeError for the disk's faults
            raise SaveFailed(f"checkpoint of step {step} failed: {_first_line(error)}") from error

    def wait(self) -> None:
        """Blocks until the save in progress is complete on disk.

        Raises:
          SaveFailed: it failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise SaveFailed(f"checkpoint failed: {_first_line(error)}") from error

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata of one checkpoint, without its arrays. Raises whatever reading it raises."""
        args = self._ocp.args
        return dict(self._manager.restore(step, args=args.Composite(metadata=args.JsonRestore()))["metadata"])

    def latest_metadata(self) -> dict[str, Any] | None:
        """The metadata of the newest checkpoint whose metadata can be read, or None."""
        for step in reversed(self.steps()):
            try:
                return self.metadata(step)
            except Exception as error:
                _log.warning("checkpoint %d in %s has unreadable metadata: %s", step, self.folder, _first_line(error))
        return None

    def restore_latest(self, like: Any) -> Restored | None:
        """The newest checkpoint that can be read, or None where there is none.

        An unreadable one is moved to `folder.corrupt/` with a warning, so that its step can be saved again.

        Args:
          like: pytree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes, dtypes and shardings to restore
            to.

        Raises:
          UserError: there are checkpoints, and none can be read.
        """
        abstract = jax.tree.map(_abstract, like)
        args = self._ocp.args
        failures: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            try:
                found = self._manager.restore(
                    step, args=args.Composite(arrays=args.StandardRestore(abstract), metadata=args.JsonRestore())
                )
            except Exception as error:  # a damaged file shows as one of a dozen types
                failures.append((step, _first_line(error)))
                continue
            for broken, reason in failures:
                _log.warning(
                    "checkpoint %d cannot be read (%s); it is set aside and step %d is used", broken, reason, step
                )
                self._set_aside(broken)
            return Restored(step, found["arrays"], dict(found["metadata"]))
        if failures:
            raise UserError(
                f"{self.folder}: none of the {len(failures)} checkpoints can be read (step {failures[0][0]}: "
                f"{failures[0][1]}); remove the folder to start afresh"
            )
        return None

    def _set_aside(self, step: int) -> None:
        aside = self.folder.with_name(self.folder.name + ".corrupt")
        aside.mkdir(exist_ok=True)
        target = aside / str(step)
        if target.exists():
            shutil.rmtree(target)
        (self.folder / str(step)).rename(target)
        self._manager.reload()

    def close(self) -> None:
        """Waits for the save in progress and stops orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _on_host(leaf: Any) -> Any:
    """An array over several devices as a whole on the host. Orbax would deal the writing of its copies out over them by
    slicing each array, and every slice is one more program to compile.
    """
    several = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
    return np.asarray(leaf) if several else leaf


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0][:200] if text else "") or type(error).__name__
