"""What one pass of the language model gives for several layers of a run: made for the first, found by the others."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def shared(setup, kind: str, depends_on: Callable[[int], dict], n_bytes: int,
           make: Callable[[list[int]], dict[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The stored entry of setup.layer, {name: tensor}; if it must be made, the run's other layers get theirs with it.

    depends_on(layer): the entry's key; make(layers): {layer: its entry}, which may not depend on what other layers
    are asked for; n_bytes: about the size of one. Layers whose entry is there already, or does not fit, are left out.
    """
    others: dict[int, dict[str, Tensor]] = {}

    def own() -> dict[str, Tensor]:
        missing = [layer for layer in setup.layers if layer != setup.layer
                   and not setup.cache.path(kind, depends_on(layer)).exists()]
        if not setup.cache.fits(n_bytes * (1 + len(missing))):
            missing = []
        made = make(sorted([setup.layer, *missing]))
        others.update((layer, made[layer]) for layer in missing)
        return made[setup.layer]

    found = setup.cache.get(kind, depends_on(setup.layer), own)
    for layer, entry in others.items():
        setup.cache.get(kind, depends_on(layer), lambda entry=entry: entry)
    return found
