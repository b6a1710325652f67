"""Reports: from ``report.json`` to a page, a picture and a table.

Everything here reads the report's JSON and nothing else, so a report can be built again, or
compared with another one, on a machine that has neither the network nor the data.
"""

from __future__ import annotations

from slimkit.report.comparison import Comparison, compare
from slimkit.report.rendering import build_html, write_report
from slimkit.report.summary import summary_table

__all__ = ["Comparison", "build_html", "compare", "summary_table", "write_report"]
