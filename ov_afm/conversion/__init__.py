"""From the name of a model to a checkpoint, and from a checkpoint to a verified OpenVINO model."""
