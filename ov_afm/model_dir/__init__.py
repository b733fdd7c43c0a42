"""The model directory: its manifest, geometry, model card and files."""
