"""The order of training rows: batches of similar length, shuffled, decided by seed and epoch alone."""

import torch

from shadowpeft.train.sampler import EpochSampler

LENGTHS = torch.randint(5, 80, (403,), generator=torch.Generator().manual_seed(0)).tolist()


def order(seed: int, epoch: int) -> list[int]:
    sampler = EpochSampler(8, LENGTHS, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_row_once_and_the_same_again() -> None:
    assert sorted(order(0, 0)) == list(range(403))
    torch.rand(3)  # the global generator has no say
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_batches_hold_similar_lengths_but_do_not_run_from_long_to_short() -> None:
    lengths = torch.tensor([LENGTHS[i] for i in order(0, 0)][:400], dtype=torch.float64).view(50, 8)
    within = (lengths.max(1).values - lengths.min(1).values).mean()
    assert within < 10  # windows of 12 batches cut lengths 5 to 79 into spans of about 6; 8 random rows span about 58
    means = lengths.mean(1)
    rank = torch.corrcoef(torch.stack([means, torch.arange(50, dtype=torch.float64)]))[0, 1]
    assert abs(float(rank)) < 0.5  # the stock order within 50 batches has -1


def test_parts_follow_one_another_each_shuffled_alone() -> None:
    sampler = EpochSampler(8, LENGTHS, 0, [100, 100, 203])
    places = list(sampler)
    first, second = places[:100], [place - 100 for place in places[100:200]]
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert sorted(places[200:]) == list(range(200, 403))
