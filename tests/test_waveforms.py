import numpy as np
import pytest
import torch

from datasets.cache import open_store
from datasets.tau import read_meta
from datasets.tau import train_rows as rows_for_training
from datasets.waveforms import Clips, batches, epoch_order

CPU = torch.device("cpu")


@pytest.fixture
def clips(tau, tmp_path) -> Clips:
    meta = read_meta(tau.root)
    rows = rows_for_training(meta)
    logits = np.arange(len(rows) * 10, dtype=np.float16).reshape(-1, 10)
    return Clips(meta, rows, open_store(meta, 32000, tmp_path, progress=False), logits)


@pytest.mark.parametrize("n_ahead", [0, 1, 3])
def test_batches_hold_the_ordered_clips_and_all_that_belongs_to_them(clips, n_ahead):
    order = epoch_order(len(clips), seed=1, epoch=2)
    seen = list(batches(clips, order, 8, CPU, n_ahead=n_ahead))
    assert [len(batch.waveform) for batch in seen] == [8, 8, 8, 3]  # the smaller last one is kept
    waveform = torch.cat([batch.waveform for batch in seen])
    assert waveform.dtype == torch.float32
    for position, index in enumerate(order.tolist()):
        stored = clips.store.read(clips.store.rows([clips.files[index]]))[0]
        assert torch.equal(waveform[position], torch.from_numpy(stored).float() / 32768)
    target = torch.cat([batch.target for batch in seen])
    assert torch.equal(target.argmax(1), clips.scene[order])
    assert torch.equal(target.sum(1), torch.ones(27))
    assert torch.equal(torch.cat([batch.recording_device for batch in seen]), clips.recording_device[order])
    assert torch.equal(torch.cat([batch.teacher_logits for batch in seen]), clips.teacher_logits[order].float())


def test_batches_can_start_within_an_epoch(clips):
    order = epoch_order(len(clips), seed=1, epoch=0)
    whole = list(batches(clips, order, 8, CPU))
    rest = list(batches(clips, order, 8, CPU, start=2))
    assert len(rest) == 2
    assert all(torch.equal(a.waveform, b.waveform) for a, b in zip(whole[2:], rest, strict=True))


def test_an_abandoned_epoch_leaves_nothing_behind(clips):
    loader = batches(clips, torch.arange(len(clips)), 4, CPU, n_ahead=2)
    next(loader)
    loader.close()


def test_clips_on_the_device_are_the_same(clips):
    order = epoch_order(len(clips), seed=0, epoch=0)
    from_store = [batch.waveform for batch in batches(clips, order, 8, CPU)]
    clips.load_onto(CPU)
    on_device = [batch.waveform for batch in batches(clips, order, 8, CPU)]
    assert all(torch.equal(a, b) for a, b in zip(from_store, on_device, strict=True))


def test_order_is_a_permutation_that_seed_and_epoch_decide():
    orders = [tuple(epoch_order(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 4
    assert orders[0] == tuple(epoch_order(50, 0, 0).tolist())


def test_an_error_of_the_reader_reaches_the_caller(clips, monkeypatch):
    def broken(_index):
        raise OSError("disk gone")

    monkeypatch.setattr(clips, "batch", broken)
    with pytest.raises(OSError, match="disk gone"):
        list(batches(clips, torch.arange(8), 4, CPU))
