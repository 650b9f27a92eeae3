"""What a built-in source is asked for, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedtrain.data.fetch import OFFICIAL
from fedtrain.errors import DataError
from fedtrain.experiment.sections import DataSection

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """One call for a source.

    Attributes:
        source: the source's name.
        section: the data section of the experiment.
        data_root: folder of the data sets' files; None if none was named.
        seed: the experiment's seed, for synthetic data.
    """

    source: str
    section: DataSection
    data_root: Path | None
    seed: int

    def file(self, relative: str) -> Path:
        """Find a file or folder of the data root.

        Raises:
            DataError: there is no data root, or no such file in it; says what to do.
        """
        ways = "Name the folder that holds it with --data-root or FEDTRAIN_DATA"
        if self.source in OFFICIAL:
            ways += f", or download it: fedtrain data fetch {self.source}"
        if self.data_root is None:
            raise DataError(f"{self.source} needs a data root, which holds {relative}", got="none", hint=ways)
        path = self.data_root / relative
        if not path.exists():
            raise DataError(f"{self.source}: there is no {relative} in the data root", got=self.data_root, hint=ways)
        return path
