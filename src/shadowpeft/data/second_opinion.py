"""A second opinion on the action: a linear classifier of the request's words, whose chances weigh the device's.

The two read a request in different ways, so they seldom fail together. What both find likely is taken: the chance of an action
is in proportion to the product of the model's and the classifier's, a product of experts (Hinton, 2002). The model is asked
token by token, so the product is formed at every branch of the actions' tokens: the chance of a token there is in proportion to
the model's times the classifier's share of the actions that go on with it.

The classifier is TF-IDF and multinomial logistic regression of scikit-learn. Its file holds numbers and texts and no code.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowpeft.data.actions import REMOTE, checked
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.json_text import parse_json
from shadowpeft.storage import whole
from shadowpeft.versions import require_sklearn

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import FeatureUnion

_NAME = "second_opinion-{}.numbers"  # not .safetensors, which servers of models take for weights
C = 100.0
"""Inverse strength of the penalty: of the packaged rows with requests out of scope, held-out families are likeliest
(docs/records/second-opinion-oos.json)."""
_ITERATIONS = 300
_FORMAT = 1
_PARTS = ("words", "characters")


def features() -> FeatureUnion:
    """Words and pairs of words; character n-grams of 2 to 5, since Chinese has no spaces and a typo changes few of them."""
    from sklearn.pipeline import FeatureUnion

    return FeatureUnion([(part, _vectorizer(part)) for part in _PARTS])


def _vectorizer(part: str, **options: Any) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer

    if part == "words":
        return TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), **options)
    return TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(2, 5), **options)


class SecondOpinion:
    """A fitted classifier.

    Attributes:
        actions: what it knows, ``REMOTE`` among them.

    Args:
        texts: of ``words`` and of ``characters``, the features in order. rarity: ``(F_part,)`` of each, inverse document
            frequencies. weights: ``(A, F)``. bias: ``(A,)``.
    """

    def __init__(
        self,
        actions: Sequence[str],
        texts: Sequence[Sequence[str]],
        rarity: Sequence[np.ndarray],
        weights: np.ndarray,
        bias: np.ndarray,
    ) -> None:
        self.actions = tuple(actions)
        self._texts, self._rarity = [list(part) for part in texts], list(rarity)
        self._weights, self._bias = np.ascontiguousarray(weights), bias  # a file holds rows
        self._vectorizers = []
        for part, words, idf in zip(_PARTS, self._texts, self._rarity, strict=True):
            vectorizer = _vectorizer(part, vocabulary={word: n for n, word in enumerate(words)})
            vectorizer.idf_ = idf
            self._vectorizers.append(vectorizer)

    @classmethod
    def fit(cls, prompts: Sequence[str], actions: Sequence[str], c: float = C) -> SecondOpinion:
        """Fitted on requests and the right action of each, ``REMOTE`` where none is; deterministic.

        Raises:
            ConfigError: if scikit-learn is not installed. DataError: if there are not two actions, or no words.
        """
        require_sklearn("a second opinion")
        from sklearn.linear_model import LogisticRegression

        names = sorted(set(actions))
        if len(names) < 2:
            raise DataError(f"the rows of the second opinion have {len(names)} action but need two; give rows of several")
        union = features()
        try:
            x = union.fit_transform(prompts)
        except ValueError as error:
            raise DataError(
                f"the rows of the second opinion have no word of two letters ({error}); give rows in words, or do without it"
            ) from error
        fitted = LogisticRegression(C=c, max_iter=_ITERATIONS).fit(x, actions)
        weights, bias = fitted.coef_, fitted.intercept_
        if len(names) == 2:  # one row of numbers says how much likelier the second is
            weights, bias = np.vstack([0 * weights, weights]), np.append(0.0, bias)
        parts = [vectorizer for _, vectorizer in union.transformer_list]
        texts = [part.get_feature_names_out().tolist() for part in parts]
        rarity = [part.idf_.astype(np.float32) for part in parts]
        return cls(fitted.classes_.tolist(), texts, rarity, weights.astype(np.float32), bias.astype(np.float32))

    @property
    def parameters(self) -> int:
        """Numbers of the classifier; the inverse document frequencies are not counted."""
        return int(self._weights.size + self._bias.size)

    def chances(self, prompt: str) -> dict[str, float]:
        """The chance of every action for a request; they add up to one."""
        from scipy.sparse import hstack

        x: csr_matrix = hstack([part.transform([prompt]) for part in self._vectorizers], format="csr")
        logits = self._weights[:, x.indices] @ x.data + self._bias  # the few features of a request, in float64
        chances = np.exp(logits - logits.max())
        return dict(zip(self.actions, (chances / chances.sum()).tolist(), strict=True))

    def save(self, folder: Path) -> str:
        """Write it whole, in the form of safetensors, under a name of its own; its :attr:`digest`."""
        content = self._content()
        digest = sha256(content).hexdigest()
        with whole(file_of(folder, digest)) as beside:
            beside.write_bytes(content)
        return digest

    @property
    def digest(self) -> str:
        """The SHA-256 of its file."""
        return sha256(self._content()).hexdigest()

    def _content(self) -> bytes:
        from safetensors.numpy import save

        about = {"format": _FORMAT, "actions": self.actions, "texts": self._texts}
        told = np.frombuffer(json.dumps(about, ensure_ascii=False).encode(), dtype=np.uint8)
        arrays = {"about": told, "weights": self._weights, "bias": self._bias}
        arrays |= {f"rarity.{part}": idf for part, idf in zip(_PARTS, self._rarity, strict=True)}
        return save(arrays)

    @classmethod
    def load(cls, folder: Path, digest: str) -> SecondOpinion:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: if the file is missing, damaged, another one or of another format, or scikit-learn is not installed.
        """
        require_sklearn("a second opinion")
        from safetensors import SafetensorError
        from safetensors.numpy import load

        file = file_of(folder, digest)
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"the second opinion '{file}' cannot be read ({error.strerror}); calibrate again") from error
        if digest != sha256(content).hexdigest():
            raise ConfigError(f"the second opinion '{file}' is not the one of its calibration; calibrate again")
        try:
            arrays = load(content)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ConfigError(f"the second opinion '{file}' is damaged ({error}); calibrate again") from error
        try:
            about = _about(arrays)
        except ValueError as error:
            raise ConfigError(f"'{file}' is no second opinion of format {_FORMAT}: {error}; calibrate again") from error
        rarity = [arrays[f"rarity.{part}"] for part in _PARTS]
        return cls(about["actions"], about["texts"], rarity, arrays["weights"], arrays["bias"])


def check_actions(known: Collection[str], actions: Iterable[str]) -> None:
    """
    Raises:
        ConfigError: if these, with ``REMOTE``, are not the actions that a second opinion knows.
    """
    needed = {*actions, REMOTE}
    differing = sorted(needed ^ set(known))
    if differing:
        lacks = "does not know" if differing[0] in needed else "also knows"
        raise ConfigError(
            f"the second opinion {lacks} '{differing[0]}', so it is about other actions than the device; fit it on rows of all "
            "of its actions, and of requests without one"
        )


def file_of(folder: Path, digest: str) -> Path:
    """Where the one with that digest is saved: each has a name of its own, so a new one leaves an old calibration whole."""
    return folder / _NAME.format(digest[:12])


def discard_others(folder: Path, digest: str | None) -> None:
    """Remove saved ones but that with the digest: they belong to calibrations that were replaced."""
    for file in folder.glob(_NAME.format("*")):
        if digest is None or file != file_of(folder, digest):
            file.unlink()


def _about(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a file says of itself.

    Raises:
        ValueError: saying what is wrong with its content.
    """
    names = {"about", "weights", "bias", *(f"rarity.{part}" for part in _PARTS)}
    if arrays.keys() != names:
        raise ValueError(f"it has {', '.join(sorted(arrays)) or 'nothing'}")
    numbers = [arrays[name] for name in sorted(names - {"about"})]
    if arrays["about"].dtype != np.uint8 or any(a.dtype != np.float32 or not np.isfinite(a).all() for a in numbers):
        raise ValueError("its numbers are of other kinds, or not finite")
    about = parse_json(arrays["about"].tobytes())
    if not isinstance(about, dict) or about.keys() != {"format", "actions", "texts"} or about["format"] != _FORMAT:
        raise ValueError("what it says of itself is something else")
    lists = [about["actions"], *about["texts"]] if isinstance(about["texts"], list) else []
    if len(lists) != 1 + len(_PARTS) or not all(isinstance(x, list) and all(isinstance(t, str) for t in x) for x in lists):
        raise ValueError("its actions or texts are no lists of texts")
    if not all(lists) or any(len(set(x)) != len(x) for x in lists):
        raise ValueError("a list of texts is empty, or has one twice")
    actions, *texts = lists
    checked([name for name in actions if name != REMOTE], "a second opinion")
    sizes = [arrays[f"rarity.{part}"].shape for part in _PARTS] == [(len(part),) for part in texts]
    fits = arrays["weights"].shape == (len(actions), sum(map(len, texts))) and arrays["bias"].shape == (len(actions),)
    if not (sizes and fits):
        raise ValueError("its arrays do not fit its texts")
    return about
