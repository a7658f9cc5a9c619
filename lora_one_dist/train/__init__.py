"""The loop over steps, its optimizer, and evaluation.  Uses config to adapters."""
