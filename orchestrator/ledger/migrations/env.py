"""Alembic's entry: `ledger.migrate` passes an open connection."""

from alembic import context

from orchestrator.ledger.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
