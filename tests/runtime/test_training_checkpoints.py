import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.runtime.checkpoint import Checkpointer, Keep, SaveFailed
from jaxstack.runtime.errors import UserError


def arrays(seed: int):
    rng = np.random.default_rng(seed)
    return {"a": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "deep": {"b.c['d']": jnp.int32(seed)}}


def test_saves_and_restores_bits_and_metadata(tmp_path):
    checkpoints = Checkpointer(tmp_path / "c")
    assert checkpoints.restore_latest(arrays(0)) is None and checkpoints.latest_metadata() is None
    tree, metadata = arrays(5), {"place": {"epoch": 1}, "sum": 0.1 + 0.2}
    checkpoints.save(5, tree, metadata)
    checkpoints.save(5, arrays(6), {})  # already there: left as it is
    checkpoints.wait()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    found = checkpoints.restore_latest(like)
    assert found.step == 5 and found.metadata == metadata == checkpoints.latest_metadata()
    jax.tree.map(np.testing.assert_array_equal, found.arrays, tree)
    checkpoints.close()


def test_keeps_the_last_every_nth_and_the_best(tmp_path):
    checkpoints = Checkpointer(tmp_path / "c", Keep(last=2, every=4, best=1))
    for step in range(1, 11):
        checkpoints.save(step, arrays(step), {}, metric=abs(step - 3))
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4, 8, 9, 10]
    checkpoints.close()


def test_leftovers_of_a_killed_save_are_passed_over_and_removed(tmp_path):
    checkpoints = Checkpointer(tmp_path / "c")
    checkpoints.save(1, arrays(1), {})
    checkpoints.close()
    (tmp_path / "c" / "2.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
    checkpoints = Checkpointer(tmp_path / "c")
    assert checkpoints.steps() == [1] and checkpoints.restore_latest(arrays(0)).step == 1
    checkpoints.close()
    assert sorted(name for name in os.listdir(tmp_path / "c") if name[0].isdigit()) == ["1"]


def test_a_failing_disk_raises_save_failed(tmp_path, monkeypatch):
    checkpoints = Checkpointer(tmp_path / "c")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(SaveFailed, match=r"checkpoint of step 3 failed: .*No space left"):
        checkpoints.save(3, arrays(3), {})
    monkeypatch.undo()
    checkpoints.save(4, arrays(4), {})
    checkpoints.close()
    assert json.dumps(sorted(os.listdir(tmp_path / "c"))).count("4") == 1


def test_bad_arguments(tmp_path):
    for fields, message in (
        ({"last": 0}, "keep.last=0"),
        ({"every": 0}, "keep.every=0"),
        ({"best": -1}, "keep.best=-1"),
    ):
        with pytest.raises(UserError, match=message):
            Keep(**fields)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        Checkpointer(tmp_path / "file" / "c")
