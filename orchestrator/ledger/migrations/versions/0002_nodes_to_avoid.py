"""nodes that an attempt avoids after one that hung"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table, column in (("trials", "suspects"), ("attempts", "avoid")):
        with op.batch_alter_table(table, schema=None) as batch_op:
            batch_op.add_column(sa.Column(column, sa.Text(), server_default="", nullable=False))


def downgrade() -> None:
    for table, column in (("trials", "suspects"), ("attempts", "avoid")):
        with op.batch_alter_table(table, schema=None) as batch_op:
            batch_op.drop_column(column)
