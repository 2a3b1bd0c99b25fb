"""The documents of one domain as an endless stream, epoch after epoch, addressed by position or by tokens."""

from __future__ import annotations

import zlib
from collections import OrderedDict

import numpy as np

from megatron_vl.data.order import SampleOrder
from megatron_vl.errors import DataError

_FEISTEL_ROUNDS = 6
_AT_ONCE = 1 << 16  # elements that are permuted together: they stay in the cache
_EPOCHS_KEPT = 2


def domain_order(name: str, num_samples: int, seed: int) -> SampleOrder:
    """The order of a domain: its own, whatever other domains there are and wherever it stands in the list."""
    return SampleOrder(num_samples, seed ^ (zlib.crc32(name.encode()) << 32))


def sample_indices(order: SampleOrder, positions: np.ndarray) -> np.ndarray:
    """`[order.index(p) for p in positions]` for int64 positions, a few hundred nanoseconds each."""
    result = np.empty(len(positions), dtype=np.int64)
    for start in range(0, len(positions), _AT_ONCE):
        epochs, within = np.divmod(positions[start : start + _AT_ONCE], order.num_samples)
        if order.shuffle:
            seed = np.array([order.seed & ((1 << 64) - 1)], dtype=np.uint64)
            keys = _mix(_mix(seed) ^ epochs.astype(np.uint64))
            within = _permuted(within, order.num_samples, keys)
        result[start : start + _AT_ONCE] = within
    return result


class DomainStream:
    """Documents of a domain with their lengths in the order in which they are trained on.

    tokens: int [n], length of each sample, 0 for one that is refused. Position p of the stream is sample
    `order.index(p)`; positions never end. Raises DataError when the domain has no token at all.
    """

    def __init__(self, name: str, tokens: np.ndarray, seed: int):
        self.name = name
        self.tokens = tokens
        self.tokens_per_epoch = int(tokens.sum(dtype=np.int64)) if len(tokens) else 0
        if self.tokens_per_epoch == 0:
            raise DataError(
                f"domain {name} is empty: none of its {len(tokens)} samples can be trained on; see the "
                "reasons in its length index, correct its paths, or give it weight 0"
            )
        self.order = domain_order(name, len(tokens), seed)
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self.tokens)

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Samples at the positions start ... stop - 1, int64."""
        return sample_indices(self.order, np.arange(start, stop, dtype=np.int64))

    def tokens_before(self, position: int) -> int:
        """Tokens of all documents before a position."""
        epoch, within = divmod(position, len(self))
        before = int(self._before(epoch)[within]) if within else 0
        return epoch * self.tokens_per_epoch + before

    def position_of(self, tokens: int) -> int:
        """The first position with at least `tokens` tokens before it."""
        # Samples without tokens at the end of an epoch have as many before them as the next epoch's first.
        epoch, rest = divmod(max(tokens - 1, 0), self.tokens_per_epoch)
        within = int(np.searchsorted(self._before(epoch), rest + min(tokens, 1), side="left"))
        return epoch * len(self) + within

    def _before(self, epoch: int) -> np.ndarray:
        """Tokens before each position of an epoch and before its end, int64 [n + 1]."""
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
            first = epoch * len(self)
            before = np.zeros(len(self) + 1, dtype=np.int64)
            np.cumsum(self.tokens[self.indices(first, first + len(self))], out=before[1:])
            self._epochs[epoch] = before
        return self._epochs[epoch]


def _permuted(positions: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """`order.permuted` over arrays: int64 positions below `size`, uint64 keys of the same length."""
    half_bits = np.uint64(max(2, ((size - 1).bit_length() + 1) // 2))
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    values = positions.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        value, key = values[walking], keys[walking]
        left, right = value >> half_bits, value & half_mask
        for number in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(key ^ np.uint64(number << 58) ^ right) & half_mask)
        value = (left << half_bits) | right
        values[walking] = value
        walking = walking[value >= np.uint64(size)]
    return values.astype(np.int64)


def _mix(value: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser of `order`, over uint64 arrays, whose arithmetic wraps."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
