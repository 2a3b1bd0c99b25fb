"""Projected image features on disk, one entry per image: written whole, read by any process, checked when read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import tensorstore as ts
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTH_BYTES = 4  # of the header, little-endian, in front of it


class DamagedFeatures(Exception):
    """An entry is not what was written: it is computed again."""


def feature_key(image: str, weights: str, rule: str) -> str:
    """The name of an entry: 64 hexadecimal digits.

    image: content digest. weights: of tower and projector. rule: everything between file and pixels (sizes of views,
    boundary rule, alpha, orientation, image mode).
    """
    return hashlib.sha256(json.dumps([image, weights, rule]).encode()).hexdigest()


class FeatureCache:
    """A folder as tensorstore's key-value store. A write appears whole or not at all, so processes may share it."""

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder).absolute()
        path.mkdir(parents=True, exist_ok=True)
        self.folder = path
        self._store = ts.KvStore.open({"driver": "file", "path": f"{path}/"}).result()

    def read(self, key: str, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The features ``[rows, width]`` of an entry on the CPU, None when there is none.

        Raises:
            DamagedFeatures: its bytes are not those that were written, or it has another shape or dtype.
        """
        found = self._store.read(self._place(key)).result()
        if found.state != "value":
            return None
        return unpack(bytes(found.value), (rows, width), dtype)

    def write(self, key: str, features: torch.Tensor) -> None:
        """Store ``[rows, width]``; an entry of that name is replaced. Raises OSError where tensorstore reports one."""
        try:
            self._store.write(self._place(key), pack(features)).result()
        except ValueError as error:  # tensorstore's for every failure of the disk
            raise OSError(f"{self.folder}: image features cannot be written: {error}") from error

    def _place(self, key: str) -> str:
        return f"{key[:2]}/{key}"


def pack(features: torch.Tensor) -> bytes:
    """Length of the header, header (shape, dtype, sha256 of the values), values."""
    plain = features.detach().cpu().contiguous()
    values = plain.view(torch.int16 if plain.dtype == torch.bfloat16 else plain.dtype).numpy().tobytes()
    header = {
        "shape": list(plain.shape),
        "dtype": str(plain.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(values).hexdigest(),
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + values


def unpack(data: bytes, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `pack`. Raises DamagedFeatures as `FeatureCache.read`."""
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    try:
        header = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + length])
        stored = tuple(header["shape"]), DTYPES[header["dtype"]]
        digest = header["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFeatures(f"header: {error!r}") from error
    values = data[LENGTH_BYTES + length :]
    if hashlib.sha256(values).hexdigest() != digest:
        raise DamagedFeatures("sha256")
    if stored != (shape, dtype):
        raise DamagedFeatures(f"{stored}, wanted {(shape, dtype)}")
    raw = np.frombuffer(bytearray(values), dtype=np.int16 if dtype == torch.bfloat16 else np.float32)
    return torch.from_numpy(raw).view(dtype).reshape(shape)
