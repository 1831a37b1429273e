import numpy
import pytest
import torch
from torch import nn

from convmae.evaluation.accuracy import judge_classifier, judge_logits
from convmae.training.engine import DeviceOptions, start_engine

metrics = pytest.importorskip("sklearn.metrics")


@pytest.fixture(scope="module")
def fabric():
    return start_engine(DeviceOptions(accelerator="cpu", precision="float32"))


def scores(number, num_classes):
    """Random logits, and labels that they often hit."""
    labels = torch.arange(number) % num_classes
    return torch.randn(number, num_classes) + 1.5 * torch.nn.functional.one_hot(labels, num_classes), labels


def check(accuracy, logits, labels):
    num_classes = logits.shape[1]
    predicted, every = logits.argmax(dim=1), range(num_classes)
    assert accuracy.top1 == pytest.approx(metrics.accuracy_score(labels, predicted))
    top5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=every) if num_classes > 5 else 1
    assert accuracy.top5 == pytest.approx(top5)
    probabilities = logits.double().softmax(dim=1)
    assert accuracy.loss == pytest.approx(metrics.log_loss(labels, probabilities, labels=every), rel=1e-5)
    expected = metrics.confusion_matrix(labels, predicted, labels=every)
    assert numpy.array_equal(accuracy.confusion.numpy(), expected)


@pytest.mark.parametrize("num_classes", [3, 5, 6, 10])
def test_scores_are_judged_as_scikit_learn_does(num_classes):
    logits, labels = scores(200, num_classes)
    accuracy = judge_logits(logits, labels, num_classes)
    check(accuracy, logits, labels)
    assert 0.3 < accuracy.top1 < accuracy.top5 <= 1
    recalls = metrics.recall_score(labels, logits.argmax(dim=1), average=None)
    torch.testing.assert_close(accuracy.per_class().double(), torch.from_numpy(recalls), atol=1e-6, rtol=0)


def test_a_class_without_images_has_no_accuracy():
    logits = torch.eye(4)[[0, 2, 2, 0]]
    accuracy = judge_logits(logits, torch.tensor([0, 0, 2, 0]), 4)
    torch.testing.assert_close(
        accuracy.per_class(), torch.tensor([2 / 3, torch.nan, 1.0, torch.nan]), equal_nan=True, rtol=1e-6, atol=0
    )
    assert accuracy.top1 == 0.75


@pytest.mark.parametrize("num_classes", [2, 7])
def test_a_model_is_judged_on_all_batches_together(fabric, num_classes):
    model = nn.Sequential(nn.Dropout(0.9), nn.Flatten(), nn.Linear(12, num_classes))
    images, labels = torch.randn(23, 3, 2, 2), torch.randint(num_classes, (23,))
    parts = zip(images.split(5), labels.split(5), strict=True)  # the last is smaller
    accuracy = judge_classifier(fabric, model, parts, num_classes)
    weight, bias = model[2].weight.detach(), model[2].bias.detach()
    logits = images.flatten(1) @ weight.T + bias
    check(accuracy, logits, labels)
    whole = judge_logits(logits, labels, num_classes)
    assert (accuracy.top1, accuracy.top5) == (whole.top1, whole.top5)
    assert accuracy.loss == pytest.approx(whole.loss, rel=1e-6)
    assert torch.equal(accuracy.confusion, whole.confusion)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_models_mode_as_it_was(fabric, training):
    class Model(nn.Module):
        seen = ()

        def forward(self, images):
            self.seen = (self.training, torch.is_grad_enabled())
            return images

    model = Model().train(training)
    judge_classifier(fabric, model, [(torch.eye(3), torch.arange(3))], 3)
    assert model.seen == (False, False)
    assert model.training == training
