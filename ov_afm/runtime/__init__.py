"""Choose a device, check that it can be trusted, load a model on it, and stream its answer."""
