"""`stablefield doctor`: what this machine offers, and whether the target is exact on it."""

from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from stablefield._doctor import check_machine
from stablefield.cli.console import console

__all__ = ["Doctor"]


@dataclass(frozen=True)
class Doctor:
    """Show versions and devices, and check the target against float64 on each device."""

    def run(self) -> int:
        """Print a table; status 1 if the target is not exact on a device."""
        found = check_machine()
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, text in found.rows():
            verdict, colon, rest = text.partition("exact: ")
            colour = "red" if verdict else "green"
            table.add_row(name, f"[{colour}]{verdict}exact[/]: {escape(rest)}" if colon else escape(text))
        console.print(table)
        if not found.healthy:
            console.print(
                "[red]The target is not exact on every device:[/] train on another one, and report this table."
            )
        return 0 if found.healthy else 1
