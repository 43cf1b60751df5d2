"""Records and manifests into HTML, Markdown, JSON and a table. Measures nothing; imports no torch."""

from __future__ import annotations

from compresskit.reports.report import Report, build

__all__ = ["Report", "build"]
