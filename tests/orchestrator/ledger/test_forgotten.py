"""Which folders of forgotten studies go, and how far a folder is counted."""

from __future__ import annotations

from pathlib import Path

from orchestrator.ledger import changes, commands
from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.retention import apply_forgotten, plan_forgotten
from orchestrator.server import accept
from orchestrator.settings import ServiceSettings, storage_root
from orchestrator.trial_folder import TrialFolder
from tests.orchestrator.submissions import identity, plan, submission


def test_folders_of_forgotten_studies_go_unless_another_study_has_results_of_them(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    settings = ServiceSettings(home=str(tmp_path))
    root = Path(storage_root(settings))
    ids = []
    for name in ("free", "lent", "borrower", "kept"):
        study, _ = accept.accept(
            ledger,
            settings,
            submission(plan("a", identity("lent" if name == "borrower" else name)), name=name),
            "ann",
            1.0,
        )
        ids.append(study)
        with ledger.writing() as transaction:
            changes.move_trial(transaction, f"{study}-000", ["queued"], state="done")
            changes.end_study_if_over(transaction, study, 2.0)
        for file in (root / study / f"{study}-000" / "result.json", root / study / "report.html"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x" * 10)
    (root / "theirs-123456").mkdir()  # another service's
    free, lent, borrower, kept = ids
    with ledger.writing() as transaction:
        for study in (free, lent):
            commands.forget_study(transaction, study, "ann", 3.0)
    with ledger.reading() as transaction:
        removals = plan_forgotten(transaction, str(root))
    assert [(removal.study, removal.bytes) for removal in removals] == [(free, 20)]
    assert apply_forgotten(ledger, removals, 4.0) == 20
    assert {path.name for path in root.iterdir()} == {lent, borrower, kept, "theirs-123456"}
    with ledger.writing() as transaction:
        commands.forget_study(transaction, borrower, "ann", 5.0)
        assert {removal.study for removal in plan_forgotten(transaction, str(root))} == {
            lent,
            borrower,
        }
    ledger.close()


def test_a_count_of_a_folder_s_bytes_has_a_bound(tmp_path):
    for name in ("a/one", "a/two", "three", "b/c/four"):
        file = tmp_path / "study" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 5)
    files = TrialFolder(str(tmp_path))
    assert files.use("study", 4) == (20, True)
    assert files.use("study", 3) == (15, False)
    assert files.use("none", 3) == (0, True)
