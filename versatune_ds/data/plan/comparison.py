"""Which samples of a step are compared with the base model (`model.kl_to_base`). A pure function of the plan.

With n samples, numbered as they lie in the step's packs, share s and u in [0, 1) drawn from seed and step,
sample i is chosen where floor((i + 1) s + u) > floor(i s + u): each with probability s, and s n of them up to
one. Neither ranks nor a resume change the choice.

What is not covered: what is done with them (`engine/model/adapters.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from versatune_ds.data.plan.packing import Pack
from versatune_ds.foundations.files import canonical_hash


def chosen_samples(packs: Sequence[Pack], share: float, seed: int, step: int) -> list[npt.NDArray[np.bool_]]:
    """For each pack of a step bool[S]: which of its samples are compared.

    Args:
        packs: all of the step's, as planned.
        share: of the samples, 0 to 1.
        seed: `run.seed`.
        step: its index, from 0.
    """
    u = int(canonical_hash(["kl_to_base", seed, step])[:5], 16) / 2**20  # few bits: i + u is exact
    marks = np.floor(np.arange(sum(map(len, packs)) + 1) * share + u)
    return np.split(np.diff(marks) > 0, np.cumsum([len(pack) for pack in packs])[:-1])
