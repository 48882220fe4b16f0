"""A study's tables as Markdown and as LaTeX: for an issue, a page of MLflow, and a paper."""

from __future__ import annotations

import re

from contract.answers import StudyView
from orchestrator.results.cells import Row, Table, answers_table, arms_table, paper_table
from orchestrator.results.comparison import Comparison
from orchestrator.results.details.headlines import headlines
from orchestrator.results.facts import Facts
from orchestrator.results.table import family_title, notes_of

# What Markdown would read as its own. HTML is escaped too: a page of MLflow shows Markdown as HTML.
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#|~])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
}


def markdown(view: StudyView, facts: Facts, comparison: Comparison) -> str:
    """The question, a line for each contrast, and the tables."""
    blocks = [facts.study.question and _plain(facts.study.question)]
    blocks.append("\n".join(f"- **{_plain(h.text)}**" for h in headlines(facts, comparison)))
    blocks += [_why_not(comparison), _pipes(arms_table(comparison, facts.study.metrics))]
    if comparison.answers:
        blocks += [f"{family_title(comparison)}:", _pipes(answers_table(comparison))]
        blocks.append(_plain(f"Scope: on {facts.scope}. Nothing else was measured."))
    if not facts.no_paper:
        published = paper_table(facts, comparison)
        blocks += [f"Beside the paper, table {facts.study.paper_table}:", _pipes(published)]
    blocks.append("\n".join(f"- {_plain(note)}" for note in notes_of(view, facts, comparison)))
    return "\n\n".join(block for block in blocks if block)


def latex(view: StudyView, facts: Facts, comparison: Comparison) -> str:
    """Tables for `booktabs`, one for the arms and one for the contrasts."""
    head = f"% {view.name} ({view.study}); \\usepackage{{booktabs}}".replace("\n", " ")
    why = _why_not(comparison).replace("*", "")
    blocks = [head, f"% {why}" if why else ""]
    blocks.append(_tabular(arms_table(comparison, facts.study.metrics)))
    if comparison.answers:
        blocks += [f"% {family_title(comparison)}", _tabular(answers_table(comparison))]
    return "\n".join(block for block in blocks if block)


def _why_not(comparison: Comparison) -> str:
    """Why there are no intervals; empty where there are some."""
    if comparison.machinery_only:
        return f"**Machinery only:** {comparison.machinery_only}."
    return f"**No intervals yet:** {comparison.early}." if comparison.early else ""


def _pipes(table: Table) -> str:
    marks = [":--" if i < table.left else "--:" for i in range(len(table.head))]
    lines = [[_plain(name) for name in table.head], marks, *map(_texts, table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _texts(row: Row) -> list[str]:
    return [_plain(cell.text) for cell in row.cells]


def _plain(text: str) -> str:
    """`text` as it reads, whatever it holds."""
    escaped = "".join(_HTML.get(character, character) for character in " ".join(text.split()))
    return _MARKDOWN.sub(r"\\\1", escaped)


def _tabular(table: Table) -> str:
    columns = "l" * table.left + "r" * (len(table.head) - table.left)
    rows = [_cells([cell.text for cell in row.cells]) for row in table.rows]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            _cells(table.head),
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _cells(texts: list[str] | tuple[str, ...]) -> str:
    escaped = ("".join(_LATEX.get(character, character) for character in t) for t in texts)
    return f"{' & '.join(escaped)} \\\\"
