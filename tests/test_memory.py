"""Peak memory over a stretch of work."""

import time

import numpy as np

from pyprune.memory import PeakMemory, release

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
