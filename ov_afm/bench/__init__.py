"""Speed: measure devices, precisions and engine options on this machine, and report the figures."""
