"""The account of records that were not used: how many for which reason, and a sample to look at.

Part of the first step of a token's way: whoever reads a unit keeps one, and the accounts of all units are merged. The
sample is chosen by hash, so it is the same whatever the order in which units were read and however they were cut.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from crystal_hpc.data.records import BLANK, Rejected, printable
from crystal_hpc.errors import StoreError

KEPT = 20  # rejected records in the sample of each reason
MOST_REJECTED = 0.01  # of all records


class Rejections:
    """Rejected records by reason: `counts`, and for each reason but BLANK the `keep` with the smallest hashes."""

    def __init__(self, keep: int = KEPT) -> None:
        self.keep = keep
        self.counts: dict[str, int] = {}
        self._samples: dict[str, dict[tuple[str, str], tuple[int, str]]] = {}  # reason -> (path, at) -> hash, sample

    def add(self, path: Path | str, rejected: Rejected) -> None:
        """Counts a rejected record of a file or folder."""
        self.counts[rejected.reason] = self.counts.get(rejected.reason, 0) + 1
        if rejected.reason != BLANK:
            self._keep(rejected.reason, printable(str(path)), rejected.at, rejected.sample)

    def _keep(self, reason: str, path: str, at: str, sample: str) -> None:
        samples = self._samples.setdefault(reason, {})
        samples[path, at] = (xxhash.xxh3_64_intdigest(f"{path}\0{at}".encode()), sample)
        if len(samples) > self.keep:
            del samples[max(samples, key=lambda place: (samples[place][0], place))]

    def merge(self, other: "Rejections") -> None:
        """Adds another account to this one."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        for reason, samples in other._samples.items():
            for (path, at), (_, sample) in samples.items():
                self._keep(reason, path, at, sample)

    def samples(self) -> dict[str, list[dict[str, str]]]:
        """For each reason the records of the sample, each with `path`, `at` and `sample`, by path and place."""
        return {
            reason: [{"path": path, "at": at, "sample": samples[path, at][1]} for path, at in sorted(samples)]
            for reason, samples in sorted(self._samples.items())
        }

    def as_json(self) -> dict[str, Any]:
        """The account as a value for JSON, the same for the same records in whatever order they came."""
        return {"keep": self.keep, "counts": dict(sorted(self.counts.items())), "samples": self.samples()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Rejections":
        """The account in what as_json gave. Raises KeyError or TypeError where it is something else."""
        account = cls(value["keep"])
        account.counts = dict(value["counts"])
        for reason, samples in value["samples"].items():
            for one in samples:
                account._keep(reason, one["path"], one["at"], one["sample"])
        return account

    @property
    def bad(self) -> int:
        """How many records were rejected, blank lines not counted."""
        return sum(count for reason, count in self.counts.items() if reason != BLANK)

    def check(self, most_rejected: float, documents: int) -> None:
        """Raises StoreError where more than the share `most_rejected` of all records, or all, were rejected."""
        records = self.bad + documents
        if self.bad > most_rejected * records:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items()) if reason != BLANK)
            raise StoreError(
                f"{self.bad} of {records} records hold no usable document, more than the {most_rejected:.2%} allowed "
                f"({reasons}); {self._one()}; mend or leave out such files, or allow more"
            )
        if not documents:
            raise StoreError("the corpus is empty: its files hold no document; name files that do")

    def _one(self) -> str:
        """One of the rejected records with its place, the same whatever the order."""
        reason, place = min(
            ((reason, place) for reason, samples in self._samples.items() for place in samples),
            key=lambda found: (self._samples[found[0]][found[1]][0], found),
        )
        (path, at), sample = place, self._samples[reason][place][1]
        return f"one of them is {at + ' of ' if at else ''}{path} ({reason}): {sample}"
