"""Rank the sites of a model by how well steering there will hold when the risk shifts, before any SAE is trained."""
