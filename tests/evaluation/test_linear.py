import numpy
import pytest
import torch

from convmae.evaluation import linear
from convmae.evaluation.linear import STRENGTHS, fit_linear_probe

sklearn_linear = pytest.importorskip("sklearn.linear_model")
preprocessing = pytest.importorskip("sklearn.preprocessing")


def overlapping(number, num_classes, channels=6):
    """Features of overlapping classes in channels of different scale and offset, and the labels."""
    labels = torch.arange(number) % num_classes
    features = torch.randn(number, channels) + torch.randn(num_classes, channels)[labels]
    return features * torch.logspace(-2, 2, channels) + torch.linspace(-3, 30, channels), labels


def by_scikit_learn(features, labels, strength):
    """Standardised features, and their logistic regression with a penalty of strength / 2 * squared weights."""
    standard = preprocessing.StandardScaler().fit_transform(features.double())
    # scikit-learn minimises C * sum of losses + squared weights / 2, so C = 1 / (strength * N). Of two classes it has
    # one vector, the difference of ours, whose square is twice the sum of theirs.
    inverse = (2 if labels.max() == 1 else 1) / (strength * len(labels))
    return standard, sklearn_linear.LogisticRegression(C=inverse, tol=1e-9, max_iter=10_000).fit(standard, labels)


@pytest.mark.parametrize("strength", [1e-3, 1e-2, 1e-1])
def test_weights_are_those_of_scikit_learn(strength):
    features, labels = overlapping(150, 4)
    probe = fit_linear_probe(features, labels, 4, (strength,))
    standard, expected = by_scikit_learn(features, labels, strength)
    deviation = features.std(dim=0, correction=0)
    # A gradient of g leaves the weights within g / strength of the best; in float32 some 1e-5 of it remain.
    numpy.testing.assert_allclose(probe.weight * deviation, expected.coef_, atol=1e-3 + 3e-5 / strength)
    log_probabilities = probe.logits(features).log_softmax(dim=1)
    numpy.testing.assert_allclose(log_probabilities, expected.predict_log_proba(standard), atol=2e-3 + 1e-4 / strength)
    numpy.testing.assert_allclose(probe.logits(features), features @ probe.weight.T + probe.bias)
    assert probe.strength == strength


def test_two_classes_of_unequal_size():
    features, labels = overlapping(120, 3)
    labels = labels.clamp_max(1)
    probe = fit_linear_probe(features, labels, 2, (1e-2,))
    standard, expected = by_scikit_learn(features, labels, 1e-2)
    difference = (probe.weight[1] - probe.weight[0]) * features.std(dim=0, correction=0)
    numpy.testing.assert_allclose(difference, expected.coef_[0], atol=3e-3)
    # Unequal classes need the intercept, which neither penalises.
    numpy.testing.assert_allclose(probe.logits(features).softmax(dim=1), expected.predict_proba(standard), atol=1e-3)


def test_noise_asks_for_strong_regularisation():
    labels = (torch.arange(400) % 5 == 0).long()
    features = torch.randn(400, 150)
    strong, weak = (fit_linear_probe(features, labels, 2, strengths) for strengths in ((1e-5, 1.0), (1e-5,)))
    assert (strong.strength, weak.strength) == (1.0, 1e-5)
    fresh = torch.randn(1000, 150)
    truth = (torch.arange(1000) % 5 == 0).long()
    hits = [(probe.logits(fresh).argmax(dim=1) == truth).float().mean() for probe in (strong, weak)]
    assert hits[0] > hits[1] + 0.05


def test_of_equally_good_strengths_the_stronger_is_taken():
    labels = torch.arange(60) % 3
    features = 100 * torch.eye(3)[labels] + torch.randn(60, 3)
    assert fit_linear_probe(features, labels, 3).strength == max(STRENGTHS)


def test_a_strength_that_hides_a_rare_class_is_not_taken():
    labels = (torch.arange(100) % 10 == 0).long()
    features = labels[:, None] + 0.1 * torch.randn(100, 1)
    probe = fit_linear_probe(features, labels, 2, (10.0, 1e-3))
    assert probe.strength == 1e-3
    assert (probe.logits(features).argmax(dim=1) == labels).all()
    assert (fit_linear_probe(features, labels, 2, (10.0,)).logits(features).argmax(dim=1) == 0).all()


def test_the_chosen_strength_is_fitted_on_all_images():
    features, labels = overlapping(80, 3)
    probe = fit_linear_probe(features, labels, 3, seed=1)
    assert probe.strength in STRENGTHS
    again, alone = (
        fit_linear_probe(features, labels, 3, seed=1),
        fit_linear_probe(features, labels, 3, (probe.strength,)),
    )
    for other in (again, alone):
        assert torch.equal(other.weight, probe.weight)
        assert torch.equal(other.bias, probe.bias)


def test_a_fifth_of_each_class_is_held_out_and_never_a_single_image():
    counts = torch.tensor([1, 2, 3, 5, 10, 40])
    labels = torch.repeat_interleave(torch.arange(6), counts)[torch.randperm(61)]
    held_out = linear._hold_out(labels, seed=0)
    assert labels[held_out].bincount(minlength=6).tolist() == [0, 1, 1, 1, 2, 8]
    assert torch.equal(held_out, linear._hold_out(labels, seed=0))
    assert not torch.equal(held_out, linear._hold_out(labels, seed=1))


def test_classes_of_a_single_image_each():
    features = torch.randn(4, 9)
    probe = fit_linear_probe(features, torch.arange(4), 4, (1e-3, 1e-1))
    assert probe.strength == 1e-3
    assert torch.equal(probe.logits(features).argmax(dim=1), torch.arange(4))


def test_a_class_without_images_is_never_predicted():
    features, labels = overlapping(90, 3)
    probe = fit_linear_probe(features, labels, 5)
    assert probe.weight.shape == (5, 6)
    assert probe.logits(features).argmax(dim=1).max() <= 2


def test_constant_features_change_nothing():
    features, labels = overlapping(90, 3)
    probe = fit_linear_probe(features, labels, 3, (1e-2,))
    wider = torch.cat([features, torch.full((90, 1), 4.0), torch.zeros(90, 1)], dim=1)
    logits = fit_linear_probe(wider, labels, 3, (1e-2,)).logits(wider)
    torch.testing.assert_close(logits, probe.logits(features), atol=1e-3, rtol=1e-3)


def test_features_from_inference_and_half_precision_are_taken():
    features, labels = overlapping(60, 3)
    with torch.inference_mode():
        features = features.clone()
    probe = fit_linear_probe(features, labels, 3, (1e-2,))
    assert not probe.weight.requires_grad
    half = fit_linear_probe(features.half(), labels, 3, (1e-2,)).logits(features.half())
    rounded = features.half().float()
    assert torch.equal(half, fit_linear_probe(rounded, labels, 3, (1e-2,)).logits(rounded))
