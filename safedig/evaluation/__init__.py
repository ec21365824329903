"""Images → records → table."""
