"""Imported last by the process that others are forked from: what each would do with the libraries is done once."""

import gc
import importlib.metadata

# gevent looks through all packages for plugins with each module that it patches: a third of a worker's start.
importlib.metadata.entry_points = importlib.metadata.entry_points().select
gc.collect()
gc.freeze()  # so that a server's collections do not go through the libraries
