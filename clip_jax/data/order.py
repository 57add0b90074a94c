"""The samples of batch k: index functions of (seed, k), the same for any number of hosts, workers and restarts.

Position p counts training pairs from the start of the run; batch k holds positions kB to (k+1)B - 1. Position p
lies in epoch ``p // N``, and every epoch is a permutation of the N samples, so a batch may span two epochs.

Two levels: the samples are cut into blocks of n consecutive ones, the blocks are permuted globally, and samples
are permuted inside a window of w permuted blocks. n = 1 is a full shuffle; large blocks make long reads on remote
shards. Nothing is materialized: a permutation is a Feistel network, applied until the result is in range, so an order
over a billion samples costs nothing to set up, and does not change with the version of any library.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import lcm

import numpy as np

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def _mix(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64: the finalizer of SplitMix64 (Steele et al. 2014), a bijection that scatters all bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fold(*words: int) -> int:
    """Several integers to one 64-bit seed; their order matters."""
    state = 0
    for word in words:  # ``_mix`` in Python's integers: sixteen times as fast for one number, and it is made per pair
        state = (state + _GOLDEN + (word & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permute(index: np.ndarray, size: int, seed: int, *, inverse: bool = False) -> np.ndarray:
    """int64[n] -> int64[n]: a seeded permutation of 0..size-1 (or its inverse) at each index.

    A Feistel network over the next power of four permutes a range up to four times too large; the network is
    applied again to results that are out of range (cycle walking: Black and Rogaway 2002), which is a permutation.
    """
    half_bits = max(1, ((max(size - 1, 1)).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = [np.uint64(fold(seed, size, r)) for r in range(_ROUNDS)]

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> shift, x & mask
        with np.errstate(over="ignore"):
            for key in reversed(keys) if inverse else keys:
                if inverse:
                    left, right = right ^ (_mix(left + key) & mask), left
                else:
                    left, right = right, left ^ (_mix(right + key) & mask)
        return (left << shift) | right

    out = network(np.asarray(index, np.int64).astype(np.uint64))
    while (outside := out >= np.uint64(size)).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The order of a training run over ``samples`` samples."""

    samples: int
    batch_size: int
    seed: int
    block: int = 1
    window: int = 1

    @property
    def epoch(self) -> int:
        """Pairs in an epoch."""
        return self.samples

    def another(self, index: int, rng: np.random.Generator) -> int:
        """A sample in place of an unusable one."""
        return int(rng.integers(self.samples))

    def positions(self, step: int) -> np.ndarray:
        """int64[batch_size]: the positions in the run that batch ``step`` holds."""
        return np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """int64[n] -> int64[n]: the sample at each position of the run."""
        epochs, offsets = np.divmod(positions, self.samples)
        out = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            out[inside] = self._shuffle(offsets[inside], fold(self.seed, int(epoch)))
        return out

    def batch(self, step: int) -> np.ndarray:
        """int64[batch_size]: the samples of batch ``step``."""
        return self.indices(self.positions(step))

    def _shuffle(self, offsets: np.ndarray, seed: int) -> np.ndarray:
        n, size = self.block, self.samples
        blocks = -(-size // n)
        missing = blocks * n - size  # the last block may be short; all blocks after its rank begin that much earlier
        short_rank = int(permute(np.array([blocks - 1]), blocks, seed, inverse=True)[0]) if missing else blocks

        def start(rank: np.ndarray) -> np.ndarray:
            """The offset at which the block of a rank (its index after the shuffle) begins; ``blocks`` is the end."""
            return rank * n - np.where(rank > short_rank, missing, 0)

        shuffled = offsets
        if n > 1:
            length = n * self.window
            window = offsets // length
            window = window + (offsets >= start(np.minimum((window + 1) * self.window, blocks)))
            shuffled = np.empty_like(offsets)
            for w in np.unique(window):
                inside = window == w
                first, last = (int(start(np.minimum(b * self.window, blocks))) for b in (w, w + 1))
                shuffled[inside] = first + permute(offsets[inside] - first, last - first, fold(seed, int(w), 1))
        rank = shuffled // n
        rank = rank + (shuffled >= start(np.minimum(rank + 1, blocks)))
        return permute(rank, blocks, seed) * n + (shuffled - start(rank))


@dataclass(frozen=True)
class MixedOrder:
    """The order of a run over several sources, whose samples are numbered one source after the other.

    Every batch has its quota of each source, rounded so that the rounding never adds up: any number of consecutive
    batches has the exact shares, to less than one pair per source. The rows of a batch are shuffled. A source has an
    order of its own over the pairs that it gives, so that each of its epochs visits each of its samples once.
    """

    orders: tuple[Order, ...]
    shares: tuple[int, ...]
    """Pairs of each source, relative to each other."""
    epoch: int
    batch_size: int
    seed: int

    def positions(self, step: int) -> np.ndarray:
        """int64[batch_size]: the positions in the run that batch ``step`` holds."""
        return np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """int64[n] -> int64[n]: the sample at each position of the run."""
        steps, offsets = np.divmod(positions, self.batch_size)
        out = np.empty_like(offsets)
        for step in np.unique(steps):
            inside = steps == step
            rows = permute(offsets[inside], self.batch_size, fold(self.seed, int(step), 4))
            before = np.array(self.counts(int(step) * self.batch_size))
            ends = np.cumsum(np.array(self.counts((int(step) + 1) * self.batch_size)) - before)
            sources = np.searchsorted(ends, rows, side="right")
            samples = np.empty_like(rows)
            for source in np.unique(sources):
                of_source = sources == source
                seen = before[source] + rows[of_source] - (ends[source - 1] if source else 0)
                samples[of_source] = self._first(source) + self.orders[source].indices(seen)
            out[inside] = samples
        return out

    def batch(self, step: int) -> np.ndarray:
        """int64[batch_size]: the samples of batch ``step``."""
        return self.indices(self.positions(step))

    def another(self, index: int, rng: np.random.Generator) -> int:
        """A sample of the same source in place of an unusable one."""
        source = max(i for i in range(len(self.orders)) if self._first(i) <= index)
        return self._first(source) + self.orders[source].another(index, rng)

    def counts(self, pairs: int) -> list[int]:
        """How many of the first ``pairs`` pairs of the run each source gives.

        Each source takes its share of what the sources before it leave, rounded down: no count ever decreases, as
        it could if each were rounded alone.
        """
        found, left, shares = [], pairs, sum(self.shares)
        for share in self.shares:
            found.append(left * share // shares)  # exact integers of any size
            left, shares = left - found[-1], shares - share
            if not shares:
                break
        return found

    def _first(self, source: int) -> int:
        return list(accumulate((order.samples for order in self.orders), initial=0))[source]


def mix(
    samples: Sequence[int],
    weights: Sequence[float],
    batch_size: int,
    seed: int,
    *,
    by_share: bool = False,
    block: int = 1,
    window: int = 1,
) -> MixedOrder:
    """The order over sources with the given numbers of samples.

    A weight says how often each sample of a source is seen, relative to the others: an epoch is the sum of
    weight * samples. ``by_share``: weights are shares of the batch, and an epoch is the sum of samples.
    """
    exact = [Fraction(str(weight)) * (1 if by_share else n) for weight, n in zip(weights, samples, strict=True)]
    denominator = lcm(*(share.denominator for share in exact))
    return MixedOrder(
        orders=tuple(Order(n, batch_size, fold(seed, i, 3), block, window) for i, n in enumerate(samples)),
        shares=tuple(int(share * denominator) for share in exact),
        epoch=sum(samples) if by_share else max(1, int(sum(exact))),
        batch_size=batch_size,
        seed=seed,
    )
