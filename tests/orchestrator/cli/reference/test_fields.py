"""The reference of fields and presets is made from the records, and stays so."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from contract.command import run_app
from contract.presets import PRESETS
from contract.run_file import complete_run
from orchestrator.cli.app import app
from orchestrator.cli.reference.fields import fields_page

ROOT = Path(__file__).parents[4]


def test_the_page_of_all_fields_is_fresh():
    page = (ROOT / "docs/fields.md").read_text(encoding="utf-8")
    assert page.strip() == fields_page().strip(), (
        'docs/fields.md is old; "maskray schema fields > docs/fields.md" makes it again'
    )


def test_the_page_says_what_the_records_say():
    page = fields_page()
    assert "## `model.roi`, kind `warp`" in page
    assert "| `steps` | `160000` | int, ≥ 1 | optimiser steps |" in page
    assert "| `reduce` | `'mean'` | `mean` `max` |" in page


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_printed_whole_and_marks_what_is_its_own(name, capsys):
    assert run_app(app, ["presets", name], "maskray") == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text) == yaml.safe_load(yaml.safe_dump(complete_run(name)))
    assert (f"  # {name}" in text) == (complete_run(name) != complete_run())


def test_presets_are_listed_and_a_slip_is_named(capsys):
    assert run_app(app, ["presets"], "maskray") == 0
    assert capsys.readouterr().out.split() == list(PRESETS)
    assert run_app(app, ["presets", "r50fpn"], "maskray") == 2
    assert "did you mean 'r50-fpn'?" in capsys.readouterr().err
