"""Rows to token batches.  Uses config."""
