"""`floyd doctor`: what this machine has for floyd, and whether it can draw."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from floyd.apps.cli.models import Device

if TYPE_CHECKING:
    from floyd.apps.doctor import Finding

AsJson = Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")]
Online = Annotated[bool, typer.Option("--online", help="Ask the hub, too, which models it opens to your token.")]

MARKS = {"ok": "ok", "note": "note", "wrong": "WRONG"}
CANNOT_DRAW = 1


def doctor(device: Device = "auto", online: Online = False, as_json: AsJson = False) -> None:
    """Look at this machine: versions, devices, memory, downloaded models; and draw a tiny picture.

    Ends with code 0 if floyd can draw, and with 1 if it cannot.
    """
    from floyd.apps.doctor import can_draw, examine, verdict

    findings = []
    for finding in examine(device, online=online):
        findings.append(finding)
        if not as_json:
            for line in told(finding):
                print(line, flush=True)
    if as_json:
        content = {"can_draw": can_draw(findings), "verdict": verdict(findings)}
        print(json.dumps({**content, "findings": [finding.to_json() for finding in findings]}, indent=2))
    else:
        print(verdict(findings))
    if not can_draw(findings):
        raise typer.Exit(CANNOT_DRAW)


def told(finding: Finding) -> list[str]:
    """A line, those that belong to it, and what to do."""
    rest = [*finding.lines, *([f"-> {finding.advice}"] if finding.advice else [])]
    return [f"{MARKS[finding.state]:6} {finding.name:9} {finding.says}", *(f"{'':16} {line}" for line in rest)]
