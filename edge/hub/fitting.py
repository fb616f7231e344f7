"""The one of several models that fits the memory of this device, by their headers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from edge.device.budget import budget_of
from edge.engine.engine import DescribedFile
from edge.engine.ledger import Ledger
from edge.errors import EdgeError, MemoryBudgetError, ModelFileError
from edge.hub.offers import Offer
from edge.loading import Loading, NativeOptions
from edge.sizes import show

__all__ = ["Fit", "OpenHeader", "choose", "consider"]

#: Opens the header of a model: a `with` that gives its path.
OpenHeader = Callable[[Offer], AbstractContextManager[str]]


@dataclass(frozen=True)
class Fit:
    """A model, and why it is the one. fits: whether it fits the memory."""

    offer: Offer
    reason: str
    fits: bool


def choose(offers: list[Offer], header: OpenHeader, memory: int | str | None) -> Fit:
    """The best of these that fits: the largest, for more bits are more precise; one of floats only
    where nothing else is there, for it is slow.

    memory: the budget, see `edge.loading.Loading`. Raises MemoryBudgetError when none fits, and
    what opening them raises when none can be run.
    """
    options = Loading.of({"memory": memory}).native
    ranked = sorted(offers, key=lambda offer: (offer.is_float, -offer.n_bytes))
    budget = budget_of(options.memory)
    if budget is not None:  # headers of models that are larger need not come
        smallest_offer = min(offers, key=lambda offer: offer.n_bytes)
        ranked = [o for o in ranked if o.n_bytes <= budget] or [smallest_offer]
    refusals = list[EdgeError]()
    smallest: MemoryBudgetError | None = None
    for offer in ranked:
        try:
            with _described(offer, header, options) as ledger:
                ledger.require()
                return Fit(offer, _why(offer, ledger, len(offers)), True)
        except MemoryBudgetError as error:
            if smallest is None or error.needed < smallest.needed:
                smallest = error
        except EdgeError as error:
            refusals.append(error)
    raise smallest or refusals[0]


def consider(offer: Offer, header: OpenHeader, memory: int | str | None) -> Fit:
    """The model that was asked for, and whether it fits. Raises what opening it raises."""
    with _described(offer, header, Loading.of({"memory": memory}).native) as ledger:
        return Fit(offer, _why(offer, ledger, 1), ledger.fits)


@contextmanager
def _described(offer: Offer, header: OpenHeader, options: NativeOptions) -> Iterator[Ledger]:
    """The memory that a model takes; `header` names it in errors of the block."""
    with header(offer) as path, DescribedFile.open(path, options, header_only=True) as described:
        if described.file.whole_bytes > offer.n_bytes:
            raise ModelFileError(
                f"has {offer.n_bytes} bytes, by its header it must have "
                f"{described.file.whole_bytes}: it is cut off",
                path=path,
            )
        yield described.ledger


def _why(offer: Offer, ledger: Ledger, n_offers: int) -> str:
    """`Q5_K_M, the best of 12 that fits: 1.2 GiB of memory of the 2.0 GiB that there are`."""
    which = offer.type or offer.name
    needs = f"{ledger.context} tokens take {show(ledger.needed)} of memory"
    if ledger.budget is not None:
        kind = "the budget is" if ledger.is_stated else "there is"
        needs += f", {kind} {show(int(ledger.budget))}"
    if not ledger.fits:
        return f"{which} does not fit this device: {needs}"
    return (
        f"{which}, the best of {n_offers} that fits: {needs}"
        if n_offers > 1
        else which + f": {needs}"
    )
