"""Ranks: how they start, meet, talk, share out work and fail.  Uses config."""
