"""`convneur doctor`: what this machine has, and what each missing part costs."""

import argparse
import json
from dataclasses import asdict
from itertools import pairwise

from convneur.launch.flags import add_json
from convneur.launch.parser import Overrides, Parsers, add_command
from convneur.system.doctor import examine, is_healthy


def add(parsers: Parsers) -> None:
    """Adds the command."""
    doctor = add_command(parsers, "doctor", run, "Show what this machine has, and what each missing part costs.")
    add_json(doctor)


def run(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur doctor`: what this machine has; status 1 where something required doesn't work."""
    findings = examine()
    healthy = is_healthy(findings)
    if args.json:
        print(json.dumps({"ok": healthy, "components": [asdict(finding) for finding in findings]}))
        return 0 if healthy else 1

    from convneur.launch.tables import show_table

    headings = ("component", "status", "version", "what is wrong, and what it costs")
    show_table(
        headings,
        [(finding.name, finding.status, finding.version or "-", finding.note) for finding in findings],
        text=headings,
        styles=["red" if finding.required and finding.status != "ok" else None for finding in findings],
        sections=[n for n, (one, two) in enumerate(pairwise(findings)) if one.group != two.group],
    )
    print("all that is required works" if healthy else "something that is required doesn't work")
    return 0 if healthy else 1
