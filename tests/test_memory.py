"""Peak memory over a stretch of work, and memory for records."""

import gc
import mmap
import time

import numpy as np
import pytest
import torch

from pyprune.base.memory import PeakMemory, Room, huge_pages, release

MIB = 1 << 20


def test_peak_sees_what_was_freed_again():
    with PeakMemory() as memory:
        block = np.ones(64 * MIB, dtype=np.uint8)
        time.sleep(0.05)
        del block
        release()
        time.sleep(0.02)
    assert 55 * MIB < memory.growth < 120 * MIB
    assert memory.peak == memory.start + memory.growth


def test_idle_stretch_grows_by_next_to_nothing():
    with PeakMemory() as memory:
        time.sleep(0.02)
    assert 0 <= memory.growth < 20 * MIB


def test_a_room_keeps_copies_side_by_side():
    room = Room(2 * Room.rounded(12) + Room.rounded(100))
    first, second = torch.arange(3.0), torch.arange(100, dtype=torch.uint8).view(10, 10)
    kept = [room.keep(first), room.keep(second.t())]
    assert torch.equal(kept[0], first) and torch.equal(kept[1], second.t())
    assert kept[1].is_contiguous() and kept[1].data_ptr() % Room.LINE == 0
    kept[0].fill_(7)
    assert torch.equal(first, torch.arange(3.0)) and torch.equal(kept[1], second.t())


def test_what_does_not_fit_a_room_stays_where_it_is():
    large = torch.zeros(1000)
    assert Room(64).keep(large) is large
    assert Room(0).keep(large) is large


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages to ask for")
def test_huge_pages_start_on_one_and_outlive_their_maker():
    pages = huge_pages(3 << 20)
    assert pages is not None and pages.data_ptr() % (2 << 20) == 0 and len(pages) == 3 << 20
    view = pages[-8:].fill_(3)
    del pages
    gc.collect()
    assert view.tolist() == [3] * 8
