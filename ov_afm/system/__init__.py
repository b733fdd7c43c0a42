"""Processes, disk, memory and the terminal."""
