import pytest
import torch

from convmae.benchmarks.contenders import count_steps, make_contenders


def test_the_arithmetic_of_base_is_the_known_one():
    """GMAC at 224x224, forward: published 17.2, visible positions only 11.2, MAE with ViT-B 9.8."""
    counted = {name: macs / 1e9 for name, macs in count_steps("pretrain", "base", 224).items()}
    # Visible tokens are not predicted: 49 tokens' part in the last block's attention, 2 x 196 x 512, output and MLP,
    # 9 x 512 x 512, and in the prediction, 512 x 768.
    spared = 49 * (2 * 196 * 512 + 9 * 512**2 + 512 * 768) / 1e9
    # MAE without class token, 85 M weights in the encoder and 25 M in the decoder, embeds visible patches only.
    spared_by_mae = spared + (85 + 25) * 1e6 / 1e9 + 147 * 768**2 / 1e9
    expected = {"published": 17.2, "ours": 11.2 - spared, "MAE, plain ViT": 9.8 - spared_by_mae}
    assert counted == {name: pytest.approx(value, abs=0.04) for name, value in expected.items()}


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_a_contender_needs_nothing_but_its_own_model(task):
    """The search for the largest batch leaves the others on another device."""
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    for contender in make_contenders(task, "tiny", 64):
        contender.model.to("meta")
        assert contender.loss_of(images.to("meta"), None).shape == ()
