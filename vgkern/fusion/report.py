"""What ``vgkern.fusion_report`` returns."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from ..text import some

__all__ = ["Fused", "FusionReport", "Left"]


@dataclass(frozen=True)
class Fused:
    """One fused layer.

    Attributes:
        name: of the module in the model.
        operations: what it computes: ("batch norm", "residual", "relu"), or some of these.
    """

    name: str
    operations: tuple[str, ...]


@dataclass(frozen=True)
class Left:
    """One batch norm that stayed what it was.

    Attributes:
        name: of the module in the model.
        reason: why it was not fused.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """``str()`` is a table: what became one operation, how often, and every batch norm that was left, with the reason.

    Attributes:
        fused: the fused layers; of a model that is not fused yet, what ``fuse`` would make.
        left: batch norms that are none.
    """

    fused: tuple[Fused, ...] = ()
    left: tuple[Left, ...] = ()

    @property
    def batch_norms(self) -> int:
        """How many batch norms the model has."""
        return self.fused_batch_norms + len(self.left)

    @property
    def fused_batch_norms(self) -> int:
        """How many of them are fused layers."""
        return sum("batch norm" in row.operations for row in self.fused)

    def __str__(self) -> str:
        title = f"{self.fused_batch_norms} of {self.batch_norms} batch norms fused"
        kinds = Counter(" + ".join(row.operations) for row in self.fused)
        rows = [(str(count), kind, "") for kind, count in kinds.most_common()]
        reasons: dict[str, list[str]] = defaultdict(list)
        for row in self.left:
            reasons[row.reason].append(row.name)
        rows += [(f"{len(names)} left", some(names), reason) for reason, names in reasons.items()]
        try:
            table = _rich(rows)
        except ImportError:
            table = _plain(rows)
        return f"{title}\n{table}"


def _plain(rows: list[tuple[str, str, str]]) -> str:
    width = max((len(row[1]) for row in rows), default=0)
    return "\n".join(f"{first:>8}  {second:{width}}  {third}".rstrip() for first, second, third in rows)


def _rich(rows: list[tuple[str, str, str]]) -> str:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = Console(width=120, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip())
