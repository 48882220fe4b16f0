"""The ledger's tables. `migrations/` creates and changes them; a test holds the two together."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

ABOUT = Table(  # one row: what tells this ledger from others
    "about",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("ledger", String(32), nullable=False),
)

LEASE = Table(  # one row: the service that may act on this ledger
    "lease",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("host", String(255), nullable=False),
    Column(
        "process", String(64), nullable=False
    ),  # pid and start time, to tell a dead holder on the same host
    Column("expires_at", Float, nullable=False),
)

USERS = Table(
    "users",
    METADATA,
    Column("name", String(80), primary_key=True),
    Column("role", String(10), nullable=False),
    Column(
        "token_hash", String(64), nullable=False, unique=True
    ),  # SHA-256 of the token, which itself is random
    Column("created_at", Float, nullable=False),
)

STUDIES = Table(
    "studies",
    METADATA,
    Column("id", String(100), primary_key=True),
    Column("name", String(80), nullable=False),
    Column("owner", String(80), nullable=False),
    Column("state", String(10), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("ended_at", Float, nullable=False, default=0.0),
    Column("storage", Text, nullable=False),
    Column("code", String(64), nullable=False, default=""),
    Column("spec", JSON, nullable=False),  # contract.study.Study
    Column("study_yaml", Text, nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("fresh", Boolean, nullable=False, default=False),
    Column("idempotency_key", String(200)),  # NULL without one
    Column("mlflow_experiment", String(100), nullable=False, default=""),
    Column("mlflow_run_id", String(64), nullable=False, default=""),  # the parent run
    Column("mlflow_closed", Boolean, nullable=False, default=False),
    Column("webhook_sent", Boolean, nullable=False, default=False),
    Column("looks", JSON, nullable=False, default=list, server_default="[]"),
    # contract.answers.Standing: of this study, and of earlier ones on the same trials
    Column("verdicts", JSON, nullable=False, default=list, server_default="[]"),
    # whether `verdicts` has those of its end
    Column("judged", Boolean, nullable=False, default=False, server_default=false()),
    UniqueConstraint("owner", "idempotency_key", name="uq_studies_owner_key"),
    Index("ix_studies_state", "state"),
)

TRIALS = Table(
    "trials",
    METADATA,
    Column("id", String(120), primary_key=True),
    Column("study", String(100), ForeignKey("studies.id", ondelete="CASCADE"), nullable=False),
    Column("position", Integer, nullable=False),  # in its study
    Column("key", String(300), nullable=False),
    Column("arm", JSON, nullable=False),
    Column("seed", Integer, nullable=False),
    Column("baseline", Boolean, nullable=False),
    Column("identity", String(64), nullable=False),
    Column("training", String(64), nullable=False, default="", server_default=""),
    Column("run", JSON, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("state", String(10), nullable=False),
    Column("queued_at", Float, nullable=False),
    Column("not_before", Float, nullable=False, default=0.0),  # end of a backoff
    Column("wish", String(10), nullable=False, default=""),  # why it stops: cancel, pause or stall
    Column("attempts", Integer, nullable=False, default=0),
    Column(
        "failures", Integer, nullable=False, default=0
    ),  # attempts that count against the study's max_attempts
    Column("lost", Integer, nullable=False, default=0),  # in a row, without a step gained
    Column("best_step", Integer, nullable=False, default=0),
    Column("metrics", JSON, nullable=False),
    Column("error", Text, nullable=False, default=""),
    Column("error_class", String(20), nullable=False, default=""),
    Column("folder", Text, nullable=False),  # its own, or that of the trial it was taken from
    Column("cached_from", String(120), nullable=False, default=""),
    Column("mlflow_run_id", String(64), nullable=False, default=""),
    Column("mlflow_closed", Boolean, nullable=False, default=False),
    Column("progress", JSON, nullable=False),
    Column("moved_at", Float, nullable=False, default=0.0),  # when the step last changed
    Column("marks", JSON, nullable=False),  # contract.attempt.Event of the trial's own files
    Column("rank_seconds", Float, nullable=False, default=0.0),  # of ended attempts, over all ranks
    Column(
        "suspects", Text, nullable=False, default="", server_default=""
    ),  # nodes that its next attempt avoids
    UniqueConstraint("study", "key", name="uq_trials_study_key"),
    Index("ix_trials_state", "state"),
    Index("ix_trials_study", "study"),
    Index("ix_trials_identity", "identity"),
    Index("ix_trials_training", "training"),
)

ATTEMPTS = Table(
    "attempts",
    METADATA,
    Column("trial", String(120), ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("submission_id", String(140), nullable=False, unique=True),
    Column(
        "state", String(10), nullable=False
    ),  # submitting, submitted, running, done, failed, stopped, lost
    Column("cause", Text, nullable=False, default=""),
    Column("started_at", Float, nullable=False),
    Column("running_at", Float, nullable=False, default=0.0),
    Column("stop_asked_at", Float, nullable=False, default=0.0),
    Column("ended_at", Float, nullable=False, default=0.0),
    Column("step", Integer, nullable=False, default=0),
    Column(
        "first_step", Integer, nullable=False, default=-1
    ),  # where it took up; -1 until it has said so
    Column(
        "avoid", Text, nullable=False, default="", server_default=""
    ),  # nodes that it was kept off
    Index("ix_attempts_state", "state"),
)

EVENTS = Table(  # append-only
    "events",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("study", String(100), nullable=False),
    Column("trial", String(120), nullable=False, default=""),
    Column("attempt", Integer, nullable=False, default=0),
    Column("kind", String(40), nullable=False),
    Column("cause", Text, nullable=False),
    Index("ix_events_study", "study"),
)
