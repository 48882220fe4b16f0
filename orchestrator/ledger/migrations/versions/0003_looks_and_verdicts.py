"""looks at a study's contrasts, verdicts that stand, trainings that trials share"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


# Never in a batch: on SQLite that may make the table anew, and dropping the old `studies` takes
# all trials with it (ON DELETE CASCADE).


def upgrade() -> None:
    for name in ("looks", "verdicts"):
        op.add_column("studies", sa.Column(name, sa.JSON(), server_default="[]", nullable=False))
    judged = sa.Column[bool]("judged", sa.Boolean(), server_default=sa.false(), nullable=False)
    op.add_column("studies", judged)
    training = sa.Column("training", sa.String(64), server_default="", nullable=False)
    op.add_column("trials", training)
    op.create_index("ix_trials_training", "trials", ["training"])


def downgrade() -> None:
    for name in ("looks", "verdicts", "judged"):
        op.drop_column("studies", name)
    op.drop_index("ix_trials_training", "trials")
    op.drop_column("trials", "training")
