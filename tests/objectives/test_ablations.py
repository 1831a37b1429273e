import torch

import convmae
from convmae.masking import random_visible


def small(**settings):
    sizes = {"widths": (8, 12, 16), "depths": (1, 2, 2), "num_heads": 2}
    decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return convmae.ConvMAE(image_size=64, **sizes, **decoder, **settings)


def test_masked_pixels_change_exactly_nothing_with_masks_at_stage_1():
    model = small(mask_stage=1)
    images, visible = torch.randn(2, 3, 64, 64), random_visible(2, (16, 16), 0.75)
    hidden = ~visible.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    perturbed = torch.where(hidden, torch.randn_like(images) * 100, images)
    assert torch.equal(model.encode(images, visible), model.encode(perturbed, visible))


def test_convolutions_without_masking_do_leak():
    model = small(masked_convolution=False)
    images, visible = torch.randn(1, 3, 64, 64), random_visible(1, (4, 4), 0.75)
    hidden = ~visible.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    perturbed = torch.where(hidden, torch.randn_like(images), images)
    assert not torch.equal(model.encode(images, visible), model.encode(perturbed, visible))


def test_the_loss_of_stage_1_masks_counts_masked_pixels_only():
    model = small(mask_stage=1, norm_pix=False)
    images, visible = torch.randn(2, 3, 64, 64), random_visible(2, (16, 16), 0.5)
    output = model(images, visible)
    predicted = output.prediction.view(2, 4, 4, 16, 16, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 64, 64)
    hidden = ~visible.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(images)
    torch.testing.assert_close(output.loss, (predicted - images)[hidden].square().mean())
