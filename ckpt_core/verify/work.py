"""What a verification was asked to do, and what it has found so far."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ckpt_core.errors import ArgumentError
from ckpt_core.verify.report import Check, Findings
from ckpt_core.verify.scan import Progress, Reading, Scan

T = TypeVar("T")


class Sample:
    """A choice of chunks: all of them, or a share of them at random, which is the same for the same seed.

    Raises:
        ArgumentError: the share is not above 0 and at most 1.
    """

    def __init__(self, share: float | None, seed: int) -> None:
        if share is not None and not 0 < share <= 1:
            raise ArgumentError(f"sample={share}: expected a share above 0 and at most 1, such as 0.05.")
        self._share = 1.0 if share is None else share
        self._random = random.Random(seed)  # noqa: S311 - a sample that can be drawn again, no secret
        self._taken = self._total = 0

    @property
    def everything(self) -> bool:
        """Whether nothing is left out."""
        return self._share == 1

    def choose(self, items: Sequence[T]) -> Sequence[T]:
        """Return the share of `items`, at least one of them, in their order."""
        count = min(len(items), max(1, round(len(items) * self._share)))
        self._total += len(items)
        self._taken += count
        return [items[place] for place in sorted(self._random.sample(range(len(items)), count))]

    def said(self) -> str:
        """Return what was left out, in words."""
        if self.everything:
            return ""
        share = f"{100 * self._share:g} % of chunks: {self._taken} of {self._total}"
        return f"{share}; digests of whole files not checked"


@dataclass(frozen=True)
class Work:
    """One verification."""

    sample: Sample
    finite: bool
    """Whether NaN and Inf are wrong."""

    progress: Progress | None = None
    findings: Findings = field(default_factory=Findings)

    def read(self, readings: Sequence[Reading]) -> None:
        """Read; problems become findings."""
        Scan(self.findings, self.progress).run(readings)

    def structure_check(self, detail: str) -> Check:
        """Return the check of what lies where."""
        return self.findings.check("structure", detail)

    def crc32_check(self) -> Check:
        """Return the check of the CRC32 that was stored with each chunk."""
        unchecked = self.findings.counts["unchecked"]
        note = f"; {unchecked} chunks had no CRC32 and are unchecked" if unchecked else ""
        return self.findings.check("crc32", f"{self.findings.counts['crc32']} chunks as they were stored{note}")

    def values_check(self, elements: int) -> Check:
        """Return the check of the values of what has `elements` elements."""
        said = "none NaN or Inf" if self.finite else "NaN and Inf allowed"
        if self.findings.counts["infinite"]:
            said = "none NaN, and Inf only in masks and bounds that the model does not train"
        return self.findings.check("values", f"{elements:,} elements, {said}")
