"""What an execution of a plan did, and of it what one shard's record keeps for a merge that is resumed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from loudmerge.arithmetic.kept import Kept
from loudmerge.executing.resume import ShardRecord
from loudmerge.planning.plan import OutputTensor


@dataclass
class Outcome:
    """What an execution did.

    notes: on the adapter's weights. kept: by key, for the tensors that were merged. rounded: terms applied,
    by how they were rounded.
    """

    notes: tuple[str, ...] = ()
    kept: dict[str, Kept] = field(default_factory=lambda: defaultdict(Kept))
    rounded: dict[str, set[tuple[str, int, int]]] = field(default_factory=lambda: defaultdict(set))

    def record(self, outputs: Iterable[OutputTensor]) -> ShardRecord:
        """What is known of some outputs."""
        keys = {output.key for output in outputs}
        kept = {key: (kept.along, kept.total) for key, kept in self.kept.items() if key in keys}
        rounded = {how: [term for term in found if term[0] in keys] for how, found in self.rounded.items()}
        return ShardRecord(kept, rounded)

    def restore(self, record: ShardRecord) -> None:
        """Takes over what an interrupted merge did."""
        self.kept.update({key: Kept(along, total) for key, (along, total) in record.kept.items()})
        for how, terms in record.rounded.items():
            self.rounded[how].update(terms)

    @property
    def terms(self) -> set[tuple[str, int, int]]:
        """Those applied."""
        return set().union(*self.rounded.values())

    @property
    def overall(self) -> Kept:
        total = Kept()
        for kept in self.kept.values():
            total.add(kept)
        return total


def merged_keys(outputs: Sequence[OutputTensor]) -> set[tuple[str, int, int]]:
    """What `Outcome.terms` must hold when every term of the plan was applied."""
    return {(output.key, term.index, term.out.start) for output in outputs for term in output.terms}
