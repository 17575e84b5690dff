"""Prints the table of targets, for people or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table

from llmir_iree.targets import FAMILIES, HOST, Chip, Family, resolve_target


def show_targets(*, as_json: bool) -> None:
    """Write the targets to stdout: a row for all chips of a family that are alike, or an object for every target."""
    if as_json:
        names = [HOST, *(_name(family, chip) for family in FAMILIES for chip in family.chips)]
        click.echo(json.dumps([asdict(resolve_target(name)) for name in names], indent=2))
        return
    table = Table("target", "chips", "driver", "subgroup", "features", box=None, padding=(0, 3, 0, 0))
    table.add_row(HOST, "this machine's CPU", FAMILIES[0].driver)
    for family in FAMILIES:
        for like, names in _groups(family):
            subgroup = "" if like.subgroup_size is None else str(like.subgroup_size)
            table.add_row(family.name, " ".join(names), family.driver, subgroup, " ".join(like.features))
    # Wide enough for nothing to be cut where the output goes to a file.
    console = Console() if Console().is_terminal else Console(width=160)
    console.print(table)
    console.print(
        "",
        "A chip follows a colon, as in cuda:sm_90; without one, the first of the family is meant. "
        f"{FAMILIES[0].name} takes any CPU that iree-compile knows.",
        *(f"{family.name}: {family.summary}. To run it needs {family.requires}." for family in FAMILIES),
        sep="\n",
        highlight=False,
    )


def _groups(family: Family) -> list[tuple[Chip, list[str]]]:
    """Chips of a family that differ in nothing but their names, in the table's order."""
    groups: list[tuple[Chip, list[str]]] = []
    for chip in family.chips:
        if groups and groups[-1][0].subgroup_size == chip.subgroup_size and groups[-1][0].features == chip.features:
            groups[-1][1].append(chip.name)
        else:
            groups.append((chip, [chip.name]))
    return groups


def _name(family: Family, chip: Chip) -> str:
    return f"{family.name}:{chip.name}" if chip.name else family.name
