"""The factors of the sites that a merge is at, and of the next, read by another thread."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future

from loudmerge.arithmetic.factors import Factors, factors
from loudmerge.planning.plan import Site
from loudmerge.system.arrays import read_array
from loudmerge.system.tensorfile import FileReader


class ReadAhead:
    """The factors of the last sites asked for, up to `limit` bytes of files."""

    def __init__(
        self,
        sites: Sequence[Site],
        reader: FileReader,
        pool: Executor,
        limit: int,
    ) -> None:
        self._sites = sites
        self._reader = reader
        self._pool = pool
        self._limit = limit
        self._held: OrderedDict[int, Future[Factors]] = OrderedDict()

    def ask(self, site: int) -> Future[Factors]:
        """Starts to read a site's pair, unless it is held. From one thread only."""
        if site not in self._held:
            while self._held and self.nbytes([*self._held, site]) > self._limit:
                self._held.popitem(last=False)
            self._held[site] = self._pool.submit(self._load, self._sites[site])
        self._held.move_to_end(site)
        return self._held[site]

    def nbytes(self, sites: Iterable[int]) -> int:
        """Bytes of the files that hold the pairs of these sites."""
        pairs = [self._sites[site].pair for site in sites]
        return sum(pair.a.nbytes + pair.b.nbytes for pair in pairs)

    def _load(self, site: Site) -> Factors:
        return factors(site, *(read_array(self._reader, entry) for entry in (site.pair.a, site.pair.b)))
