import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoder import dataset, examples

from jaxstack.training.data import Example
from jaxstack.training.packing import PackedBatches, PackedLoader, Place, pack, permutation


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=80))
def test_pack_keeps_every_example_once_and_no_row_overflows(lengths):
    lengths = np.array(lengths, np.int64)
    rows = pack(lengths, 32)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= 32 for row in rows)
    # First-fit-decreasing's guarantee, against the bound that no packing beats.
    assert len(rows) <= 11 / 9 * np.ceil(lengths.sum() / 32) * 1.5 + 1


def test_pack_is_first_fit_decreasing():
    # Longest first: 7 | 6 | 5 -> row of 5; 4 -> beside 6; 3 -> beside 7; 2 -> beside 5.
    assert pack(np.array([2, 7, 5, 3, 4, 6]), 10) == [[1, 3], [5, 4], [2, 0]]


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"3\.\.11 do not fit rows of 1\.\.10"):
        pack(np.array([3, 11]), 10)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 3), st.sampled_from([3, 16, 4096]), st.booleans())
def test_batches_hold_every_document_once_contiguous_with_positions_from_0(count, seed, epoch, window, packing):
    items = examples(count, seed=seed)
    batches = PackedBatches(dataset(items), row_count=3, row_length=24, seed=seed, packing=packing, window=window)
    seen = []
    for batch in batches.epoch_batches(epoch):
        assert all(v.shape == (3, 24) for v in batch.values())
        for r in range(3):
            segments = batch["segment_ids"][r]
            real = segments[segments != 0]
            assert (np.diff(real) >= 0).all() and (np.diff(real) <= 1).all() and not segments[len(real) :].any()
            assert packing or set(real) <= {1}
            for s in np.unique(real):
                at = segments == s
                assert (batch["positions"][r][at] == np.arange(at.sum())).all()
                seen.append((*batch["token_ids"][r][at], *batch["loss_mask"][r][at]))
            assert not batch["loss_mask"][r][segments == 0].any()
    assert sorted(seen) == sorted((*e.token_ids, *e.loss_mask) for e in items)


def test_order_is_a_function_of_seed_and_epoch():
    batches = [PackedBatches(dataset(examples(50)), row_count=4, row_length=32, seed=s) for s in (1, 1, 2)]
    again = PackedBatches(dataset(examples(50)), row_count=4, row_length=32, seed=1)
    list(again.epoch_batches(0))  # having been through another epoch changes nothing
    assert batches[0].rows(1) == batches[1].rows(1) == again.rows(1)
    assert batches[0].rows(1) != batches[0].rows(2) and batches[0].rows(1) != batches[2].rows(1)
    assert sorted(permutation(9, seed=0, epoch=0)) == list(range(9))


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_most_targets_is_that_of_the_fullest_microbatch(accum_steps):
    batches = PackedBatches(dataset(examples(50)), row_count=4, row_length=32, seed=3)
    in_an_epoch = batches.batches_in(0)
    for steps in (1, in_an_epoch - 1, 2 * in_an_epoch + 1):
        place, most = Place(), 0
        for _ in range(steps):
            arrays = batches.batch(place)
            targets = (arrays["loss_mask"] * (arrays["positions"] > 0)).reshape(accum_steps, -1).sum(1)
            most, place = max(most, int(targets.max())), batches.after(place)
        assert batches.most_targets(steps, accum_steps) == most


def test_short_examples_fill_rows():
    items = examples(2000, longest=60)
    assert PackedBatches(dataset(items), row_count=8, row_length=256).fill_rate() > 0.98


def test_loader_continues_at_its_state_whatever_it_had_prepared():
    batches = PackedBatches(dataset(examples(30)), row_count=2, row_length=24, seed=3)
    straight = PackedLoader(batches)
    expected = [straight.next() for _ in range(3 * batches.batches_in(0))]
    straight.close()
    place, found = Place(), []
    while len(found) < len(expected):
        loader = PackedLoader(batches, place=place, prefetch=4)
        found += [loader.next() for _ in range(min(4, len(expected) - len(found)))]
        place = loader.state()
        loader.close()
    for a, b in zip(expected, found):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert place.epoch >= 1 and Place(**place.as_json()) == place


def test_loader_stops_while_waiting_and_hands_on_failures():
    batches = PackedBatches(dataset(examples(3)), row_count=1, row_length=24)

    def slow(batch):
        raise RuntimeError("no such device")

    loader = PackedLoader(batches, transform=slow)
    with pytest.raises(RuntimeError, match="no such device"):
        loader.next()
    loader.close()
    import threading

    held = threading.Event()
    loader = PackedLoader(batches, transform=lambda batch: held.wait(10) and batch)
    assert loader.next(stop=lambda: True) is None
    assert loader.state() == Place()
    held.set()
    loader.close()
    with pytest.raises(RuntimeError, match="make a new PackedLoader"):
        running = PackedLoader(batches)
        running.next()
        running.close()
        running._thread = object()  # still running
        running.set_state(Place(1, 0))


def test_masks_reach_the_batch():
    item = Example(np.array([5, 6, 7], np.int32), np.array([False, False, True]))
    (batch,) = PackedBatches(dataset([item]), row_count=1, row_length=5).epoch_batches()
    np.testing.assert_array_equal(batch["loss_mask"], [[0, 0, 1, 0, 0]])
