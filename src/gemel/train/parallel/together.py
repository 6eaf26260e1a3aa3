"""Something that all ranks do beside training, and then rank 0 for all of them: a save.

It runs in threads while training's own exchanges go on, which have an order that no thread may disturb. So nothing is exchanged here: ranks
leave word for each other in the store where they met, and look for it now and then. A word has the number of what it is about, which no
run before has used, and nobody leaves the next before the last was heard; so each rank needs one place for its words, however long the
run is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from gemel.config.errors import CheckpointError
from gemel.train.parallel.mesh import POLL_S, Mesh

Json = dict[str, Any]


class Together:
    """`waits` is true while this rank has done its part and others have not."""

    def __init__(self, mesh: Mesh):
        self._mesh, self._number, self.waits = mesh, mesh.from_first(time.time_ns()), False

    def do(self, each: Callable[[], Json], rest: Callable[[Sequence[Json]], None]) -> None:
        """Do `each` on this rank; on rank 0 then `rest`, with what `each` returned on all, when all have. Returns when that is done.

        What goes wrong on a rank is raised there, and `CheckpointError` with its words on all others.
        """
        self._number += 1
        mesh = self._mesh
        try:
            done = each()
            if mesh.first:
                rest([done, *map(self._hear, range(1, mesh.num_ranks))])
        except BaseException as error:
            self._say({}, str(error) or type(error).__name__)
            raise
        self._say(done, None)
        if not mesh.first:
            self._hear(0)

    def _say(self, done: Json, error: str | None) -> None:
        self._mesh.tell(f"together/{self._mesh.rank}", json.dumps([self._number, done, error]))

    def _hear(self, rank: int) -> Json:
        """What a rank has done, when it has."""
        self.waits = True
        while (said := json.loads(self._mesh.told(f"together/{rank}") or "[0]"))[0] != self._number:
            time.sleep(POLL_S)
        self.waits = False
        _, done, error = said
        if error is not None:
            raise CheckpointError(error)
        return dict(done)
