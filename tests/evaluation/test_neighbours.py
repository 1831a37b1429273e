import numpy
import pytest
import torch

from convmae.evaluation import neighbours
from convmae.evaluation.neighbours import classify_by_neighbours, nearest

sklearn_neighbours = pytest.importorskip("sklearn.neighbors")


@pytest.fixture
def data():
    """Queries, a collection of features of very different lengths, and its labels."""
    features = torch.randn(60, 12) * torch.rand(60, 1).mul(6).exp()
    return torch.randn(25, 12), features, torch.arange(60) % 4


@pytest.mark.parametrize("k", [1, 5, 60])
@pytest.mark.parametrize("similarities", [10, 7 * 60, 2**20])
def test_the_most_similar_come_first(data, monkeypatch, k, similarities):
    monkeypatch.setattr(neighbours, "_SIMILARITIES", similarities)
    queries, features, _ = data
    similarity, index = nearest(queries, features, k)
    search = sklearn_neighbours.NearestNeighbors(n_neighbors=k, metric="cosine").fit(features.double())
    distance, expected = search.kneighbors(queries.double())
    assert numpy.array_equal(index, expected)
    numpy.testing.assert_allclose(similarity, 1 - distance, atol=1e-5)


def test_no_more_neighbours_than_there_are(data):
    queries, features, _ = data
    similarity, index = nearest(queries, features[:3], 20)
    assert similarity.shape == index.shape == (25, 3)
    assert (index.sort(dim=1).values == torch.arange(3)).all()


def test_half_precision_is_compared_in_full():
    feature = torch.full((1, 1000), 100.0)  # its squared length, 1e7, is beyond float16
    similarity, _ = nearest(feature.half(), feature.half(), 1)
    torch.testing.assert_close(similarity, torch.ones(1, 1))


def weights_of(distance):
    return numpy.exp((1 - distance) / 0.07)


@pytest.mark.parametrize("k", [1, 20, 60])
def test_neighbours_vote_as_in_scikit_learn(data, k):
    queries, features, labels = data
    scores = classify_by_neighbours(queries, features, labels, 4, k)
    classifier = sklearn_neighbours.KNeighborsClassifier(k, metric="cosine", weights=weights_of)
    classifier.fit(features.double(), labels)
    shares = scores.double() / scores.double().sum(dim=1, keepdim=True)
    numpy.testing.assert_allclose(shares, classifier.predict_proba(queries.double()), atol=1e-4)
    assert numpy.array_equal(scores.argmax(dim=1), classifier.predict(queries.double()))


def test_one_close_neighbour_outvotes_many_distant_ones():
    features = torch.tensor([[1.0, 0.1], *[[0.5, 1.0]] * 9])
    labels = torch.tensor([2, *[0] * 9])
    scores = classify_by_neighbours(torch.tensor([[3.0, 0.0]]), features, labels, 4, 10)
    assert scores.argmax() == 2
    assert (scores[0, [1, 3]] == 0).all()
