"""Read recordings as one channel of float32 samples at a model's sampling rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optin_export.errors import InputError, OptinError, missing_package
from optin_export.workdir.opening import open_regular

#: Longer recordings are refused before they are decoded: a compressed file may hold days of silence.
MOST_SECONDS = 3600.0


@dataclass(frozen=True)
class Header:
    """A recording's length in its own samples, its sampling rate in Hz, and its number of channels."""

    samples: int
    rate: int
    channels: int

    def at(self, rate: int) -> int:
        """Number of samples at another rate."""
        common = math.gcd(rate, self.rate)
        return -(-self.samples * (rate // common) // (self.rate // common))


def require_soundfile() -> Any:
    """The package that reads recordings; raises EnvironmentLacks if it is not installed."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: without its C library
        raise missing_package("soundfile", "audio", "audio") from None
    return soundfile


def header_of(value: Any, rate: int) -> Header:
    """The header of a file, or of samples in memory: an array at `rate`, or {"array", "sampling_rate"}.

    Raises InputError for one that cannot be read, is empty, or is longer than an hour.
    """
    if isinstance(value, Path):
        info = _opened(value, require_soundfile().info)
        found = Header(int(info.frames), int(info.samplerate), int(info.channels))
    else:
        array, own = _given(value, rate)
        found = Header(len(array), own, 1 if array.ndim == 1 else array.shape[1])
    if not 0 < found.samples <= MOST_SECONDS * found.rate:
        why = "it has no samples" if found.samples <= 0 else f"it is longer than {MOST_SECONDS:g} seconds"
        raise InputError(f"cannot use the recording {name_of(value)}", why, "cut it into parts, or remove it")
    return found


def samples_of(value: Any, rate: int) -> np.ndarray:
    """float32 [samples] in -1..1 at `rate`: the mean of all channels, resampled by a polyphase filter."""
    header_of(value, rate)  # its limits hold at every reading
    if isinstance(value, Path):
        soundfile = require_soundfile()
        array, own = _opened(value, lambda file: soundfile.read(file, dtype="float32"))
    else:
        array, own = _given(value, rate)
    array = array if array.ndim == 1 else array.mean(1)
    if own != rate:
        from scipy.signal import resample_poly

        common = math.gcd(rate, own)
        array = resample_poly(array, rate // common, own // common)
    if not np.isfinite(array).all():
        raise InputError(
            f"cannot use the recording {name_of(value)}", "it holds NaN or infinity", "remove or repair it"
        )
    return np.ascontiguousarray(array, np.float32)


def name_of(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else f"given as a {type(value).__name__}"


def _opened(path: Path, read: Any) -> Any:
    """The result of `read` for the opened file; every error of the library becomes an InputError."""
    try:
        with open_regular(path) as file:
            return read(file)
    except OptinError:
        raise
    except Exception as error:  # damaged files raise the library's own types
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"cannot read the recording {path}", why, "remove or repair it") from None


def _given(value: Any, rate: int) -> tuple[np.ndarray, int]:
    """Samples in memory and their rate."""
    if isinstance(value, Mapping) and "array" in value:
        value, rate = value["array"], int(value.get("sampling_rate") or rate)
    array = np.asarray(value) if isinstance(value, np.ndarray | list | tuple) else None
    if array is None or array.dtype.kind != "f" or array.ndim not in (1, 2) or rate <= 0:
        shown = f"an array of {array.dtype} {list(array.shape)}" if array is not None else f"a {type(value).__name__}"
        raise InputError(
            "the recordings cannot be used",
            f"one is {shown}",
            "give paths, floating-point arrays [samples] in -1..1, or {'array': ..., 'sampling_rate': ...}",
        )
    return array.astype(np.float32), rate
