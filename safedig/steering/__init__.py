"""Acting on activations: where (gate), how (edits), how far (guard), together at sites of a pipeline (steering)."""
