"""How many samples does the one-step gradient need, and which rank?  Measured on the user's own model and data."""
