"""Acting on activations: where (gate), how (edits), and the two together at sites of a pipeline (steering)."""
