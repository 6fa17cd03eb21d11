"""The ledger: every row read is kept or quarantined with a reason, and every file refused is named."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class PartLedger:
    """Rows of one part: `read == kept + sum(quarantined.values())`."""

    read: int = 0
    kept: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)


@dataclass
class Ledger:
    """Adds up over parts, in whatever order and on whatever machine they were read.

    parts    part name -> its rows
    refused  part name -> why the file was refused; a refused file contributes no rows
    """

    parts: dict[str, PartLedger] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def read(self) -> int:
        return sum(part.read for part in self.parts.values())

    @property
    def kept(self) -> int:
        return sum(part.kept for part in self.parts.values())

    @property
    def quarantined(self) -> Counter[str]:
        """Rows by reason, over all parts."""
        total: Counter[str] = Counter()
        for part in self.parts.values():
            total.update(part.quarantined)
        return total

    def add(self, part: str, kept: int, reasons: Counter[str]) -> None:
        """Count a validated chunk: rows kept, and rows quarantined by reason."""
        entry = self.parts.setdefault(part, PartLedger())
        entry.read += kept + reasons.total()
        entry.kept += kept
        entry.quarantined.update(reasons)

    def withdraw(self, part: str, reason: str, rows: int) -> None:
        """Quarantine rows that were counted as kept, as duplicates are once all parts are seen."""
        if rows:
            self.parts[part].kept -= rows
            self.parts[part].quarantined[reason] += rows

    def refuse(self, part: str, reason: str) -> None:
        """Name a file that could not be read; rows counted for it so far no longer are."""
        self.parts.pop(part, None)
        self.refused[part] = reason

    def merge(self, other: "Ledger") -> None:
        """Add another ledger's counts, part by part."""
        for name, part in other.parts.items():
            self.add(name, part.kept, part.quarantined)
        self.refused |= other.refused

    def check(self) -> None:
        """Assert that the rows add up; if they do not, this project lost some."""
        for name, part in self.parts.items():
            total = part.kept + part.quarantined.total()
            assert part.read == total and part.kept >= 0, (
                f"{name}: {part.read} rows read, {total} accounted for"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back, with the totals for people who open the file."""
        return {
            "read": self.read,
            "kept": self.kept,
            "quarantined": dict(self.quarantined),
            "refused": dict(sorted(self.refused.items())),
            "parts": {
                name: {"read": part.read, "kept": part.kept, "quarantined": dict(part.quarantined)}
                for name, part in sorted(self.parts.items())
            },
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The ledger that `to_json` wrote."""
        parts = {
            name: PartLedger(part["read"], part["kept"], Counter(part["quarantined"]))
            for name, part in values["parts"].items()
        }
        return cls(parts, dict(values["refused"]))

    def summary(self) -> str:
        """What a person should know, in a few lines."""
        quarantined = self.quarantined
        lines = [f"{self.read:,} rows read = {self.kept:,} kept + {quarantined.total():,} quarantined"]
        lines += [f"  {rows:>12,}  {reason}" for reason, rows in quarantined.most_common()]
        if self.refused:
            lines.append(f"{len(self.refused):,} files refused:")
            lines += [f"  {name}: {reason}" for name, reason in sorted(self.refused.items())[:10]]
            if len(self.refused) > 10:
                lines.append(f"  ... and {len(self.refused) - 10:,} more")
        return "\n".join(lines)
