"""Takes the looks that are due, and writes down the verdicts of studies that are over.

Each step finds its work in the ledger and is one transaction there: a service that dies in between
leaves the look to the next one, which finds the same.
"""

from __future__ import annotations

import logging

from contract.answers import Standing, StudyView
from contract.study import FINAL_STATES, Looks, Study
from orchestrator.ledger import changes, queries
from orchestrator.ledger.opening import Ledger
from orchestrator.results.facts import gather
from orchestrator.results.looks import Look, answers_of, due, take_look, verdicts_of
from orchestrator.server.views import study_views
from orchestrator.study.contrasts import arm_name
from orchestrator.trial_folder import TrialFileError

LOG = logging.getLogger("maskray")


def take_due(ledger: Ledger, now: float) -> int:
    """How many looks and judgements it wrote down."""
    with ledger.reading() as transaction:
        studies = queries.studies_to_look_at(transaction)
    count = 0
    for study in studies:
        try:
            count += _step(ledger, study, now)
        except (OSError, TrialFileError) as error:
            # of one study's storage or files: the others must not wait for it
            words = " ".join(str(error).split())
            LOG.warning("look at %s: %s; tried again", study, words)
        except Exception:
            # Nobody foresaw it, but the looks of the other studies go on.
            LOG.exception("look at %s failed; tried again", study)
    return count


def _step(ledger: Ledger, study: str, now: float) -> bool:
    with ledger.reading() as transaction:
        views = study_views(transaction, {}, study)
    if not views:
        return False  # somebody forgot it
    view = views[0]
    try:
        seeds = Study.model_validate(view.spec).seeds
    except ValueError as error:  # an older version accepted it; its report cannot be made either
        LOG.warning("%s: no verdicts, its study has another form: %s", study, error)
        changes.note_verdicts(ledger, study, [], now)
        return False
    if isinstance(seeds, Looks) and due(view, seeds):
        look = take_look(view, gather(view), now)
        if look is not None:
            return _note(ledger, view, look, now)
    if view.state not in FINAL_STATES:
        return False
    # Another study on the same trials may have ended since this one was submitted.
    earlier = _earlier(ledger, view)
    view = view.model_copy(update={"verdicts": [*view.verdicts, *earlier]})
    verdicts = [*earlier, *verdicts_of(view, answers_of(view, gather(view)), now)]
    changes.note_verdicts(ledger, study, [verdict.model_dump() for verdict in verdicts], now)
    return True


def _earlier(ledger: Ledger, view: StudyView) -> list[Standing]:
    with ledger.reading() as transaction:
        known = queries.verdicts_on(transaction, [trial.identity for trial in view.trials])
    found = [Standing.model_validate(verdict) for verdict in known]
    return [verdict for verdict in found if verdict not in view.verdicts]


def _note(ledger: Ledger, view: StudyView, look: Look, now: float) -> bool:
    taken = look.taken
    stopped = {arm for one in [*view.looks, taken] for arm in one.stopped}
    held = [trial for trial in view.trials if trial.state == "held"]
    spare = [trial.trial for trial in held if arm_name(trial.arm) in stopped]
    seeds = Study.model_validate(view.spec).seeds
    assert isinstance(seeds, Looks)
    after = next((number for number in seeds.looks if number > taken.seeds), 0)
    release = [trial.trial for trial in held if trial.trial not in spare and trial.seed < after]
    text = (
        f"at {taken.seeds} seeds: {len(taken.closed)} of {len(taken.tested)} contrasts closed, "
        f"{len(release)} trials start, {len(spare)} are spared"
    )
    noted = changes.Noted(
        taken.model_dump(),
        text,
        [verdict.model_dump() for verdict in look.verdicts],
        release,
        spare,
        {t.trial: t.state for t in view.trials if t.seed < taken.seeds},
    )
    LOG.info("study %s: look %s", view.study, text)
    return changes.note_look(ledger, view.study, len(view.looks), noted, now)
