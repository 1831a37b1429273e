"""Average precision where images are of several classes, against scikit-learn's."""

import numpy
import pytest
import torch
from lightning.fabric import Fabric
from sklearn.metrics import average_precision_score
from torch.nn.functional import binary_cross_entropy_with_logits

from convmae.evaluation.multi_label import judge_multi_label


def test_figures_are_those_of_scikit_learn(recwarn):
    numbers = numpy.random.default_rng(0)
    logits = torch.from_numpy(numbers.normal(size=(50, 5)).astype(numpy.float32))
    labels = torch.from_numpy((numbers.random((50, 5)) < 0.3).astype(numpy.float32))
    labels[:, 3] = 0
    batches = [(logits[:20], labels[:20]), (logits[20:], labels[20:])]
    found = judge_multi_label(Fabric(accelerator="cpu"), torch.nn.Identity(), batches, 5)
    expected = [average_precision_score(labels[:, n], logits[:, n]) for n in (0, 1, 2, 4)]
    assert found.classes[[0, 1, 2, 4]].tolist() == pytest.approx(expected, rel=1e-5)
    assert found.classes[3].isnan()
    assert found.score == pytest.approx(numpy.mean(expected), rel=1e-5)
    assert found.counts.tolist() == labels.sum(0).int().tolist()
    assert found.loss == pytest.approx(binary_cross_entropy_with_logits(logits, labels).item(), rel=1e-5)
    assert found.figures == {"map": found.score, "validation_loss": found.loss}
    assert not [warning for warning in recwarn if "No positive" in str(warning.message)]


def test_a_single_class():
    logits, labels = torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([[1.0], [1.0], [0.0]])
    found = judge_multi_label(Fabric(accelerator="cpu"), torch.nn.Identity(), [(logits, labels)], 1)
    assert found.classes.tolist() == pytest.approx([5 / 6])
