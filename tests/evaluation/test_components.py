import numpy
import torch

from convmae.evaluation.components import principal_components


def test_components_are_those_of_a_singular_value_decomposition():
    features = torch.randn(200, 12) * torch.arange(1, 13) + 5
    centred = (features - features.mean(dim=0)).numpy()
    left, values, _ = numpy.linalg.svd(centred, full_matrices=False)
    expected = left[:, :3] * values[:3]
    got = principal_components(features, 3).numpy()
    signs = numpy.sign((got * expected).sum(axis=0))
    numpy.testing.assert_allclose(got, expected * signs, rtol=1e-3, atol=1e-3)


def test_signs_do_not_depend_on_the_order_of_the_features():
    features = torch.randn(50, 8) * torch.arange(1, 9)
    order = torch.randperm(50)
    torch.testing.assert_close(principal_components(features)[order], principal_components(features[order]))


def test_a_single_token_has_no_components():
    assert principal_components(torch.randn(1, 8)).tolist() == [[0, 0, 0]]
