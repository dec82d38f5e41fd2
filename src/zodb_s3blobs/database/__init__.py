"""A database as a command reads it, beside its server."""
