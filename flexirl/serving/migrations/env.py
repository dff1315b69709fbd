"""Runs the migrations on the connection that `store.open_database` hands over."""

from alembic import context

from flexirl.serving.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
