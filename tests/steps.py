"""Weights of a step between two layers, for its tests."""

import torch


def weights_of_a_step(update, bias, norm, *, d, r, m, scale=1.0, device="cpu", dtype=torch.float32, requires_grad=False):
    """As ``shadowpeft.ops.fused.Weights``, drawn anew; what is not asked for is None."""

    def random(*shape):
        return (scale * torch.randn(*shape, dtype=torch.promote_types(dtype, torch.float32))).to(device, dtype)

    of_update = [None] * 6
    if update:
        of_update = [random(2 * m, d), random(2, d, m), None, None, None, None]
        if bias:
            of_update[2:4] = random(2 * m), random(2, d)
        if norm:
            of_update[4:] = random(d), random(d)
    made = random(r, d), random(d, r), *of_update
    return tuple(each if each is None else each.requires_grad_(requires_grad) for each in made)
