"""Smaller checkpoints: fewer layers, neurons and vocabulary rows, with what that costs."""
