"""Alignment: the calls of one forward matched with those of a call table, without counting.

Rules, the first that applies:

1. The key (run, function, operands) is in the table: that call; of several equal ones the next.
2. An operand is a parameter that the table has exactly once for this run and function: that call
   (a layer whose input is another than at capture).
3. All but the floats are those of exactly one captured call, and these follow the input
   (``x * height ** -0.5``): that call. Should another, unknown call of the function run in the
   same run, it is not certain which is which.
4. Of two or more live operands, the one made last is the last-made of exactly one captured call
   of the function, with that one, constants and equal operands in the same places: that call (a
   residual branch was skipped, so that an older value comes in). Looser forms stole addresses
   from ``y + y`` or ``y + noise``.
5. Otherwise the call is unknown: nothing is planned for it. It is *transparent*, its result keeps
   the name of its first live operand, so that noise, mixup and auxiliary sums rename nothing
   behind them; that name is *tainted* from then on.

Calls of the table that do not run are fine (early exits, skipped layers), unless something else
may have run in their place: :meth:`Alignment.check` says what raises. What is planned must be
unambiguous or an error; the calls in between need not be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

from slimkit.errors import AddressError
from slimkit.graph.call_table import CallTable, Entry, Operands, is_live, without_floats
from slimkit.graph.frames import Frame
from slimkit.graph.functions import function_of

__all__ = ["Alignment"]


class Alignment:
    """What one forward has met of a table so far.

    Args:
        table: of the capture.
        planned: addresses that something is planned for: where one of them cannot be told,
            that is an error.

    Attributes:
        met: addresses of the captured calls that ran.
    """

    def __init__(self, table: CallTable, planned: Set[str]) -> None:
        self.table = table
        self.met: set[str] = set()
        self._index = table.index
        self._planned = planned
        self._met_runs: set[str] = set()
        self._extra_runs: list[str] = []
        self._unknown: dict[tuple[str, str], Operands] = {}
        self._tainted: list[tuple[str, str]] = []
        self._other_floats: list[tuple[str, str, str]] = []

    def find(self, frame: Frame, function: str, operands: Operands) -> Entry | None:
        """The captured call that this one is, and what its result is called.

        Raises:
            AddressError: it is like a planned call that ran already, or uses a planned weight.
        """
        entries = self._index.by_key.get((frame.label, function, operands))
        if entries is not None:
            for entry in entries:
                if entry[0] not in self.met:
                    self._meet(frame, entry[0], operands)
                    return entry
            self._check_extra(
                entries, f"it ran {len(entries) + 1} times, at capture {len(entries)}"
            )
        return (
            self._by_parameter(frame, function, operands)
            or self._by_all_but_floats(frame, function, operands)
            or self._by_latest(frame, function, operands)
        )

    def name_of_repeat(self, frame: Frame, function: str, operands: Operands) -> str | None:
        """What an unplanned call gives that ran before on equal operands; None for no such call.

        A detector pads image after image: whatever number of them there was at capture, each
        is called what the first is.
        """
        entries = self._index.by_key.get((frame.label, function, operands))
        return entries[-1][1] if entries else None

    def unknown(self, frame: Frame, function: str, operands: Operands) -> None:
        """Note a call that the capture has not seen."""
        self._unknown[frame.label, function] = operands

    def label(self, caller: str, path: str, operands: Operands) -> str:
        """Which run of a module begins: by its path, else by who calls it, on what."""
        labels = self._index.by_path.get(path, ())
        if len(labels) != 1:
            labels = self._index.by_run.get((caller, path, operands), ())
        for label in labels:
            if label not in self._met_runs:
                self._met_runs.add(label)
                return label
        self._extra_runs.append(path)
        return f"{path}@?"

    def _meet(self, frame: Frame, address: str, operands: Operands) -> None:
        self.met.add(address)
        if frame.tainted and not frame.tainted.isdisjoint(operands):
            self._tainted.append((frame.label, address))

    def _by_parameter(self, frame: Frame, function: str, operands: Operands) -> Entry | None:
        for operand in operands:
            entries = None
            if operand[0] in "./":
                entries = self._index.by_parameter.get((frame.label, function, operand))
            if entries is None:
                continue
            if len(entries) == 1 and entries[0][0] not in self.met:
                self.met.add(entries[0][0])
                return entries[0]
            self._check_extra(
                entries, f"its weight is used on {operands[0]!r}, which was not captured"
            )
        return None

    def _by_all_but_floats(self, frame: Frame, function: str, operands: Operands) -> Entry | None:
        rest = without_floats(operands)
        if len(rest) == len(operands):
            return None
        entries = self._index.by_all_but_floats.get((frame.label, function, rest), ())
        if len(entries) != 1 or entries[0][0] in self.met:
            return None
        address = entries[0][0]
        self._meet(frame, address, operands)
        self._other_floats.append((frame.label, function, address))
        return entries[0]

    def _by_latest(self, frame: Frame, function: str, operands: Operands) -> Entry | None:
        latest = self._index.latest(frame.label, operands)
        if latest is None:
            return None
        entries = self._index.by_latest.get((frame.label, function, latest), ())
        if len(entries) != 1 or entries[0][0] in self.met:
            return None
        address = entries[0][0]
        if _pattern(self.table.calls[address].operands, latest) != _pattern(operands, latest):
            return None
        self._meet(frame, address, (latest,))
        return entries[0]

    def _check_extra(self, entries: list[Entry], why: str) -> None:
        address = entries[-1][0]
        if address in self._planned:
            raise AddressError(
                f"the forward makes other calls than at capture: {why}", where=address
            )

    def check(self, *, complete: bool = False) -> None:
        """Every planned call ran once, or did not run and nothing else ran in its place.

        Args:
            complete: every planned call must have run.

        Raises:
            AddressError: a planned module ran more often than at capture; of equal calls only
                some ran; a planned call did not run, but an unknown call of its function did in
                the same run of the module; a call was matched by a tainted name, where a
                captured call is missing and an unknown one of the same function ran; or by all
                but its floats, where an unknown one of its function ran.
        """
        left = self._planned - self.met
        if self._extra_runs:
            self._check_runs()
        if self._unknown:
            self._check_uncertain(left)
        for address in left & self.table.calls.keys() if left else ():
            self._check_missing(address)
        if complete and left:
            raise AddressError("it was planned for, and does not run", where=min(left))

    def _check_runs(self) -> None:
        for path in self._extra_runs:
            for address in self._planned:
                if address.startswith((f"{path}:", f"{path}.")):
                    raise AddressError("its module runs more often than at capture", where=address)

    def _check_uncertain(self, left: Set[str]) -> None:
        for run, function, address in self._other_floats:
            if address in self._planned and (run, function) in self._unknown:
                raise AddressError(
                    f"{function} ran with other numbers than at capture, and more often",
                    where=address,
                )
        if not self._tainted:
            return
        wanting = set(self._kinds(left))
        unmet = set(
            self._kinds(a for a, c in self.table.calls.items() if c.new and a not in self.met)
        )
        runs = {run for run, _ in unmet & self._unknown.keys()}
        for run, address in self._tainted:
            suspect = address in self._planned or (run, function_of(address)) in wanting
            if suspect and run in runs:
                raise AddressError("calls that were not captured ran before it", where=address)

    def _kinds(self, addresses: Iterable[str]) -> Iterator[tuple[str, str]]:
        """(run, function) of captured calls."""
        for address in addresses:
            call = self.table.calls.get(address)
            if call is not None:
                yield call.run, function_of(address)

    def _check_missing(self, address: str) -> None:
        call, function = self.table.calls[address], function_of(address)
        alike = self._index.by_key[call.run, function, call.operands]
        if any(other in self.met for other, _ in alike):
            raise AddressError("only some of several equal calls ran", where=address)
        instead = self._unknown.get((call.run, function))
        if instead is not None:
            raise AddressError(
                f"at capture its operands were {', '.join(call.operands)}, but now {function} "
                f"runs on {', '.join(instead)}",
                where=address,
            )


def _pattern(operands: Operands, latest: str) -> list[int]:
    """Which operands are fixed (−1), the one made last (−2), and which of the others are equal."""
    return [
        -2 if operand == latest else operands.index(operand) if is_live(operand) else -1
        for operand in operands
    ]
