"""Fewer rounds of Python's garbage collector. To be imported first by a process that imports torch.

That makes a million objects that stay: to look through them again and again takes a fifth of the time of importing, and
once more at the end half a second.
"""

from __future__ import annotations

import atexit
import gc

__all__: list[str] = []

gc.set_threshold(10_000, 10, 10)
atexit.register(gc.freeze)
