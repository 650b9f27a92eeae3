"""Fewer rounds of Python's garbage collector. To be imported first by a process that imports torch.

That makes some 200,000 objects that stay; to look through them again and again takes a tenth of the time of importing.
"""

from __future__ import annotations

import gc

__all__: list[str] = []

gc.set_threshold(10_000, 10, 10)
