"""Suspicious labels: against cleanlab's own ranking and scikit-learn's neighbours, on drawn data with known flips."""

import numpy as np
import pytest
from cleanlab.filter import find_label_issues
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import NearestNeighbors

from fivefold.audit.label_errors import agreement, confused_classes, find_neighbours, find_suspects

ROWS, CLASSES = 900, 4


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Points in four clouds, their given classes, of which 8 % are wrong, out-of-fold log-probabilities, and which are wrong."""
    random = np.random.default_rng(0)
    truth = np.arange(ROWS) % CLASSES
    points = random.normal(size=(ROWS, 6)) + 2.2 * np.eye(CLASSES, 6)[truth]
    flipped = random.permutation(ROWS) < 0.08 * ROWS
    codes = np.where(flipped, (truth + random.integers(1, CLASSES, ROWS)) % CLASSES, truth)
    probs = cross_val_predict(LogisticRegression(), points, codes, cv=5, method="predict_proba")
    return points, codes, np.log(probs), flipped


def test_flipped_labels_come_first_and_as_cleanlab_ranks_them(drawn):
    _, codes, log_probs, flipped = drawn
    suspects = find_suspects(log_probs, codes, 5000)
    first = suspects["row"][: flipped.sum()]
    assert flipped[first].mean() >= 0.7
    ranked = find_label_issues(codes, np.exp(log_probs), return_indices_ranked_by="self_confidence", n_jobs=1)
    assert suspects["row"][suspects["issue"]].tolist() == ranked.tolist()
    assert len(suspects) == max(len(ranked), 90)
    assert (suspects["given"] == codes[suspects["row"]]).all()
    assert (suspects["suggested"] != suspects["given"]).all()
    probs = np.exp(log_probs)[suspects["row"]]
    np.testing.assert_allclose(suspects["given_probability"], probs[range(len(probs)), suspects["given"]])
    np.testing.assert_allclose(suspects["suggested_probability"], probs[range(len(probs)), suspects["suggested"]])
    assert find_suspects(log_probs, codes, 7)["row"].tolist() == suspects["row"][:7].tolist()


def test_agreement_is_the_share_of_models_that_predict_the_suggestion(drawn):
    _, codes, log_probs, _ = drawn
    suspects = find_suspects(log_probs, codes, 20)
    always, never = np.zeros(ROWS, int), np.full(ROWS, -1)
    always[suspects["row"]] = suspects["suggested"]
    half = np.where(np.isin(np.arange(ROWS), suspects["row"][:10]), always, codes)
    assert agreement(suspects, [always, never]).tolist() == [1.0] * 20
    assert agreement(suspects, [never]).tolist() == [0.0] * 20
    assert agreement(suspects, [always, half]).tolist() == [1.0] * 10 + [0.5] * 10


def test_neighbours_are_those_of_scikit_learn(drawn):
    points, codes, log_probs, _ = drawn
    suspects = find_suspects(log_probs, codes, 300)
    near = find_neighbours(suspects, points, codes, np.arange(ROWS))
    index = NearestNeighbors(n_neighbors=ROWS, metric="cosine").fit(points - points.mean(axis=0))
    order = index.kneighbors((points - points.mean(axis=0))[suspects["row"]], return_distance=False)
    for place, row in enumerate(suspects.itertuples()):
        others = order[place][order[place] != row.row]
        assert near.given_share[place] == np.mean(codes[others[:10]] == row.given)
        assert near.suggested_share[place] == np.mean(codes[others[:10]] == row.suggested)
        assert near.nearest_given[place] == others[codes[others] == row.given][0]
        assert near.nearest_suggested[place] == others[codes[others] == row.suggested][0]


def test_rows_with_the_same_image_are_no_neighbours_and_a_lone_class_has_none():
    points = np.array([[1.0, 0.0], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    codes = np.array([0, 1, 0, 2])
    log_probs = log_softmax(np.array([[0.0, 3, 0], [0, 3, 0], [3, 0, 0], [0, 0, 3]]), axis=1)
    suspects = find_suspects(log_probs, codes, 4)
    near = find_neighbours(suspects, points, codes, np.array([5, 5, 6, 7]))
    place = suspects["row"].tolist().index(0)
    assert (near.nearest_given[place], near.nearest_suggested[place]) == (2, -1)


def test_classes_confused_both_ways_are_listed_and_one_way_ones_are_not():
    codes = np.repeat([0, 1, 2, 3], 10)
    guesses = codes.copy()
    guesses[[0, 1, 2]], guesses[[10, 11]] = 1, 0  # 30 % and 20 % both ways
    guesses[20:25] = 3  # half of class 2 one way
    pairs = confused_classes(np.log(np.eye(4)[guesses] + 1e-6), codes)
    assert pairs == [(0, 1, pytest.approx(0.3), pytest.approx(0.2))]
