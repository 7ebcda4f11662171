"""The rival that any user would try first: TF-IDF and a linear support vector machine, fitted in seconds (scikit-learn).

It is a method like any other: whatever an edge model is worth is shown beside it, on the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowpeft.data import robot
from shadowpeft.data.second_opinion import features

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline
    from sklearn.svm import LinearSVC

TITLE = "TF-IDF and LinearSVC"
ITERATIONS = 5_000
"""The usual 1,000 are too few for a C of 30."""
ROBOT_C = 1.0
"""Of commands and all open rows, chosen on development rows (experiments/records/rivals/robot-svc-open.json)."""


def classifier(c: float) -> LinearSVC:
    """One against all the others, for each class."""
    from sklearn.svm import LinearSVC

    return LinearSVC(C=c, max_iter=ITERATIONS, random_state=0)


def fit(texts: Sequence[str], labels: Sequence[Any], c: float = 1.0) -> Pipeline:
    """The fitted classifier; deterministic."""
    from sklearn.pipeline import make_pipeline

    return make_pipeline(features(), classifier(c)).fit(texts, labels)


def predict(model: Pipeline, texts: Sequence[str]) -> tuple[list[Any], list[float]]:
    """Labels, and how far the best class is ahead of the second (the confidence of a decision)."""
    values, classes = model.decision_function(texts), model.classes_.tolist()
    if values.ndim == 1:  # two classes have one number
        return [classes[int(v > 0)] for v in values], [float(abs(v)) for v in values]
    two = np.sort(values, axis=1)[:, -2:]
    return [classes[i] for i in values.argmax(1)], (two[:, 1] - two[:, 0]).tolist()


def fit_robot(source: str = "robot") -> Pipeline:
    """Fitted on what the edge model of a packaged set (``robot.SETS``) learns: its commands, and all else as ``REMOTE``."""
    rows = [row for name in robot.SETS[source] for row in robot.load(name)]
    return fit([row["prompt"] for row in rows], [row["skill"] for row in rows], ROBOT_C)
