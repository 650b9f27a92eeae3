"""Imported last by the server of worker processes: all that it has imported is spared the garbage collector.

Else it would take half a second to end, for which whoever reads the command's output from a pipe waits. Workers share
the memory of these objects as long as no collector writes to them.
"""

from __future__ import annotations

import gc

__all__: list[str] = []

gc.freeze()
