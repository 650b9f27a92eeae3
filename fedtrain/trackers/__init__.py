"""Trackers: TensorBoard, Weights & Biases and MLflow, all fed from a run's records."""
