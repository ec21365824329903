"""Sparse autoencoders: the two halves, their training through sae-lens, their files and their measures."""
