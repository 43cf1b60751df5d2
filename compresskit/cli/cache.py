"""`compresskit cache`: what is kept from run to run, and how to be rid of it."""

from __future__ import annotations

import json
from datetime import datetime

import click

from compresskit.progress import size


@click.group()
def cache() -> None:
    """List or remove what is kept from run to run: tokens, teachers' outputs, costs, kernels, times."""


@cache.command("ls")
@click.argument("kinds", nargs=-1)
@click.option("--verify", is_flag=True, help="Read every entry and compare its checksums.")
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON on the last line.")
def ls(kinds: tuple[str, ...], verify: bool, as_json: bool) -> None:
    """List the entries of KINDS, the largest first; all of them where none is named."""
    from compresskit.caches import KINDS, cached, fault_of
    from compresskit.home import cache_home

    found = [(entry, fault_of(entry) if verify else "") for entry in cached(kinds)]
    for kind in kinds or KINDS:
        mine = [entry for entry, _ in found if entry.kind == kind]
        taken = size(sum(entry.nbytes for entry in mine))
        click.echo(f"{kind}: {len(mine)} x {KINDS[kind].says}, {taken}")
    for entry, fault in found:
        made, damage = datetime.fromtimestamp(entry.made_s), f"  DAMAGED: {fault}" if fault else ""
        click.echo(f"  {size(entry.nbytes):>9}  {made:%Y-%m-%d %H:%M}  {entry.name}{damage}")
    click.echo(f"in {cache_home()}: {size(sum(entry.nbytes for entry, _ in found))}")
    if as_json:
        rows = [{"name": e.name, "bytes": e.nbytes, "made_s": e.made_s, "fault": why} for e, why in found]
        click.echo(json.dumps({"home": str(cache_home()), "verified": verify, "entries": rows}))
    if any(fault for _, fault in found):
        raise SystemExit(2)


@cache.command("rm")
@click.argument("names", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Entries of every kind.")
@click.option("--older-than", type=click.FloatRange(min=0), default=0.0, metavar="DAYS", help="Only these.")
@click.option("--dry-run", is_flag=True, help="Tell what would go.")
def rm(names: tuple[str, ...], every: bool, older_than: float, dry_run: bool) -> None:
    """Remove the entries NAMES: a kind, or kind/name as `ls` shows it (its first characters suffice)."""
    from compresskit.caches import KINDS, chosen, remove, sweep

    if every == bool(names):
        raise click.UsageError("name entries to remove, or give --all for every one")
    entries = chosen(names or KINDS, older_than_days=older_than)
    for entry in entries:
        click.echo(f"{'would remove' if dry_run else 'removes'} {entry.name}  {size(entry.nbytes)}")
    freed = sum(entry.nbytes for entry in entries) if dry_run else remove(entries) + sweep()
    click.echo(f"{'would free' if dry_run else 'freed'} {size(freed)}")
