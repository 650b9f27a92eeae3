"""Entropy coders: fewer bytes, without loss."""

from __future__ import annotations

import sys
import zlib

from fedtrain.compression.stages import Coder
from fedtrain.errors import CodecError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["Deflate", "Zstd"]

_LEAST_WINDOW, _MOST_WINDOW = 10, 31  # of zstd, as powers of two


class Deflate(Coder):
    """Huffman codes and runs of equal bytes, from the standard library.

    On quantised updates deflate's search for other repeats takes ten times as long, and gains nothing at 4 bits.
    """

    def compress(self, content: bytes) -> bytes:
        """Write a raw deflate stream."""
        writer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE)
        return writer.compress(content) + writer.flush()

    def decompress(self, content: bytes, size: int) -> bytes:
        """Read a raw deflate stream."""
        reader = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            result = reader.decompress(content, size + 1)
        except zlib.error as error:
            raise CodecError(f"the deflate stream is damaged ({error})") from error
        return _whole(result, size, ended=reader.eof and not reader.unused_data)


class Zstd(Coder):
    """Zstandard: from the standard library (Python 3.14), or the package backports.zstd.

    Args:
        level: 1 to 22; on quantised updates a higher one takes longer and gains next to nothing.
    """

    def __init__(self, level: int = 1) -> None:
        self._level = level

    def compress(self, content: bytes) -> bytes:
        """Write one zstd frame."""
        return zstd.compress(content, level=self._level)

    def decompress(self, content: bytes, size: int) -> bytes:
        """Read one zstd frame."""
        # The frame says how much memory its reader needs: no more than the content has.
        window = min(max(size.bit_length(), _LEAST_WINDOW), _MOST_WINDOW)
        reader = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window})
        try:
            result = reader.decompress(content, max_length=size + 1)
        except zstd.ZstdError as error:
            raise CodecError(f"the zstd frame is damaged ({error})") from error
        return _whole(result, size, ended=reader.eof and not reader.unused_data)


def _whole(content: bytes, size: int, ended: bool) -> bytes:
    if not ended or len(content) != size:
        raise CodecError("the entropy-coded bytes are truncated, or too many", expected=f"{size} bytes of content")
    return content
