"""What a source leaves out of its files: counted by reason, reported at the start, and an error if it is too much."""

from dataclasses import dataclass, field
from typing import Any, Self

from clip_jax.errors import UserError

MAX_SHARE = 0.01
"""The default of ``config.data.max_bad_share``."""
SMALL = 1000
"""A smaller set may lose as many pairs as a set of this size: one lost pair in ten proves nothing."""

MAX_NOTES = 12


@dataclass
class LeftOut:
    """Counts by reason, each with the name of the first file or member."""

    pairs: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Images without captions, captions without images, and anything else that loses a pair."""
    others: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Files that were never part of a pair."""

    def pair(self, reason: str, name: str, count: int = 1) -> None:
        _add(self.pairs, reason, name, count)

    def other(self, reason: str, name: str, count: int = 1) -> None:
        _add(self.others, reason, name, count)

    def update(self, more: Self) -> None:
        for reason, (count, name) in more.pairs.items():
            self.pair(reason, name, count)
        for reason, (count, name) in more.others.items():
            self.other(reason, name, count)

    def notes(self) -> tuple[str, ...]:
        """A line per reason, the most frequent ones, for the header of a run."""
        counts = [*_by_count(self.pairs), *_by_count(self.others)]
        lines = [f"left out: {count} {reason} (first: {name})" for reason, (count, name) in counts[:MAX_NOTES]]
        return (*lines, *([f"left out for {len(counts) - MAX_NOTES} further reasons"] if counts[MAX_NOTES:] else []))

    def is_too_much(self, used: int, max_share: float) -> bool:
        """Whether the lost pairs are more than ``max_share`` of all, or as many as the ``used`` ones."""
        lost = sum(count for count, _ in self.pairs.values())
        return lost > max_share * max(used + lost, SMALL) or 0 < lost >= max(max_share, 0.5) * (used + lost)

    def check(self, where: str, used: int, max_share: float) -> None:
        """Raises UserError with the reasons if too many pairs are lost."""
        if self.is_too_much(used, max_share):
            lost = sum(count for count, _ in self.pairs.values())
            reasons = "; ".join(f"{count} {reason} (first: {name})" for reason, (count, name) in _by_count(self.pairs))
            raise UserError(
                f"{where}: {lost} of {used + lost} pairs are incomplete: {reasons}; complete or remove them, or raise "
                "config.data.max_bad_share"
            )

    def to_json(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "others": self.others}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(*({reason: tuple(entry) for reason, entry in values[name].items()} for name in ("pairs", "others")))


def _add(counts: dict[str, tuple[int, str]], reason: str, name: str, count: int) -> None:
    before, first = counts.get(reason, (0, name))
    counts[reason] = (before + count, first)


def _by_count(counts: dict[str, tuple[int, str]]) -> list[tuple[str, tuple[int, str]]]:
    return sorted(counts.items(), key=lambda item: -item[1][0])
