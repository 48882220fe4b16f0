"""looks at a study's contrasts, verdicts that stand, trainings that trials share"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("studies", schema=None) as batch_op:
        for name in ("looks", "verdicts"):
            batch_op.add_column(sa.Column(name, sa.JSON(), server_default="[]", nullable=False))
        batch_op.add_column(
            sa.Column("judged", sa.Boolean(), server_default=sa.false(), nullable=False)
        )
    with op.batch_alter_table("trials", schema=None) as batch_op:
        batch_op.add_column(sa.Column("training", sa.String(64), server_default="", nullable=False))
        batch_op.create_index("ix_trials_training", ["training"])


def downgrade() -> None:
    with op.batch_alter_table("studies", schema=None) as batch_op:
        for name in ("looks", "verdicts", "judged"):
            batch_op.drop_column(name)
    with op.batch_alter_table("trials", schema=None) as batch_op:
        batch_op.drop_index("ix_trials_training")
        batch_op.drop_column("training")
