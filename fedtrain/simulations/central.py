"""The central test set of a run."""

from __future__ import annotations

from fedtrain.data.base import Examples
from fedtrain.data.federated import PartitionedData
from fedtrain.experiment.sections import Experiment

__all__ = ["central_examples"]


def central_examples(experiment: Experiment, data: PartitionedData) -> Examples | None:
    """Find the examples that the server may measure the model on; None where there is nothing that it may measure."""
    if experiment.personalization.private:
        return None  # a model without its private parts is nobody's
    if experiment.privacy and data.dataset.test_targets is None:
        return None  # the clients' own test examples are theirs
    return data.central_test()
