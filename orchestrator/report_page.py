"""The report as one HTML page."""

from __future__ import annotations

import html

from orchestrator.compare import Comparison
from orchestrator.config import StudyView
from orchestrator.report_facts import Facts
from orchestrator.report_table import text_report


def html_page(view: StudyView, facts: Facts, comparison: Comparison) -> str:
    return f"<!doctype html><meta charset=utf-8><pre>{html.escape(text_report(view, facts, comparison))}</pre>"
