"""Faster MLPs on the CPU from the zeros that ReLU² makes.

`relu(up(x))²` is exactly zero for most neurons, and the rows of `down` that belong to them need not even be
read. The parts: `profile` measures the zeros on a user's text, `pack` rewrites a model's MLPs into one
operation each, `extension` finds the native library that runs it (sources in `csrc/`), `layout` says in numpy
how packed weights lie in memory.
"""
