"""Tables of results: one class for the terminal, markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Rows of named columns. `str` aligns them for a terminal; numbers keep full precision in JSON and CSV.

    ``formats`` holds a format specification for columns whose numbers should not have the default one.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    formats: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        right = self._numeric()
        lines = (
            "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
            for row in cells
        )
        return "\n".join(line.rstrip() for line in lines)

    def to_markdown(self) -> str:
        """GitHub-flavoured markdown, numbers to the right."""
        head, *body = self._cells()
        rule = ["--:" if right else "---" for right in self._numeric()]
        escaped = ([cell.replace("|", "\\|") for cell in row] for row in (head, rule, *body))
        return "\n".join("| " + " | ".join(row) + " |" for row in escaped)

    def to_csv(self) -> str:
        """RFC 4180 text with a header row; empty cells for missing values."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def to_json(self) -> str:
        """A JSON list with one object per row."""
        return json.dumps([dict(zip(self.columns, row, strict=True)) for row in self.rows], indent=2)

    def _numeric(self) -> list[bool]:
        """Whether each column holds numbers."""
        return [any(isinstance(row[i], int | float) for row in self.rows) for i in range(len(self.columns))]

    def _cells(self) -> list[list[str]]:
        specs = [self.formats.get(column) for column in self.columns]
        body = ([_format(value, spec) for value, spec in zip(row, specs, strict=True)] for row in self.rows)
        return [list(self.columns), *body]


def _format(value: object, spec: str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float) and spec is not None:
        return format(value, spec)
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"
    return str(value)
