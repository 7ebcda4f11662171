"""The plot of losses can be read: labels of its axis do not lie over each other."""

from itertools import pairwise

import pytest
from matplotlib import pyplot as plt

from shadowpeft.train.progress import draw_losses


@pytest.mark.parametrize("low", [1e-7, 1e-4, 3e-3, 0.04, 0.3, 0.7])
def test_labels_of_the_losses_do_not_overlap(low):
    high = 5.0
    losses = [high * (low / high) ** (step / 40) for step in range(41)]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    try:
        draw_losses(axes, [{"step": step, "task_loss": loss} for step, loss in enumerate(losses)])
        figure.canvas.draw()
        assert axes.get_yscale() == "log"
        bottom, top = axes.get_ylim()
        shown = [
            (label.get_text(), label.get_window_extent())
            for which in (False, True)
            for place, label in zip(axes.get_yticks(minor=which), axes.get_yticklabels(minor=which), strict=True)
            if label.get_text() and bottom <= place <= top
        ]
        boxes = sorted((box for _, box in shown), key=lambda box: box.y0)
        assert all(first.y1 <= second.y0 for first, second in pairwise(boxes)), [t for t, _ in shown]
        assert len(shown) >= 2
    finally:
        plt.close(figure)
