"""Which sample comes when: pure functions of the seed and of the global sample number.

Global sample numbers count from 0 over the whole run: step k trains on the numbers k*G ... k*G + G-1 (G =
global batch size). Which rank and which micro-batch holds a number depends on the layout; which sample a
number means does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.errors import DataError

_MASK64 = (1 << 64) - 1
_FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class SampleOrder:
    """The order of a data set of `num_samples` samples: a fresh permutation per epoch, or file order.

    Needs no memory and no state: any number can be asked for at any time, which is all that resuming takes.
    """

    num_samples: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError(
                f"num_samples = {self.num_samples}: an order needs at least one sample; check data.train"
            )

    def index(self, number: int) -> int:
        """Index of the sample that global sample number `number` means, 0 <= index < num_samples."""
        epoch, position = divmod(number, self.num_samples)
        if not self.shuffle:
            return position
        return permuted(position, self.num_samples, _mix(_mix(self.seed & _MASK64) ^ epoch))


def permuted(position: int, size: int, key: int) -> int:
    """Image of `position` under a permutation of range(size) chosen by `key` (64 bits).

    A balanced Feistel network over the next power of four, walked until it lands inside the range (on average
    fewer than four times): a bijection for every key, the same on every machine and version, without a table
    of the data.
    """
    half_bits = max(2, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    value = position
    while True:
        left, right = value >> half_bits, value & half_mask
        for round_number in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(key ^ (round_number << 58) ^ right) & half_mask)
        value = (left << half_bits) | right
        if value < size:
            return value


def rows_for_step(
    step: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """Global sample numbers of one data-parallel rank in one step: one list per micro-batch, in order.

    Over the ranks and micro-batches of a step every number of the step occurs once, for every dp_size and
    micro_batch_size. Raises ValueError when they do not divide the global batch.
    """
    rows_per_micro_batch = micro_batch_size * dp_size
    if global_batch_size % rows_per_micro_batch or not 0 <= dp_rank < dp_size:
        raise ValueError(
            f"global_batch_size = {global_batch_size} must be a multiple of micro_batch_size x data-parallel "
            f"size = {micro_batch_size} x {dp_size}, and dp_rank = {dp_rank} one of its ranks"
        )
    first = step * global_batch_size + dp_rank * micro_batch_size
    last = (step + 1) * global_batch_size
    return [
        list(range(start, start + micro_batch_size)) for start in range(first, last, rows_per_micro_batch)
    ]


def _mix(value: int) -> int:
    """The splitmix64 finaliser: every bit of the result depends on every bit of the 64-bit value."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
