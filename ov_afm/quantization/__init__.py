"""What weights become: calibration data, rounding, and the compression of an OpenVINO model."""
