import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convmae import UserError
from convmae.masking import random_visible
from convmae.packing import Packing

shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 5), st.integers(2, 5), st.sampled_from([1, 2, 4]), st.integers(1, 3)
)


def naive_pack(dense, visible, side):
    """The definition, cell by cell."""
    images = []
    for image, seen in zip(dense, visible, strict=True):
        tokens = []
        for row, column in seen.nonzero().tolist():
            tokens.append(image[row * side : (row + 1) * side, column * side : (column + 1) * side])
        images.append(torch.stack(tokens))
    return torch.stack(images)


@given(shape=shapes, ratio=st.floats(0.05, 0.95))
def test_pack_takes_out_the_visible_cells_in_row_major_order(shape, ratio):
    batch, height, width, side, channels = shape
    visible = random_visible(batch, (height, width), ratio)
    dense = torch.randn(batch, height * side, width * side, channels)
    assert torch.equal(Packing.of(visible).pack(dense), naive_pack(dense, visible, side))


@given(shape=shapes, ratio=st.floats(0.05, 0.95))
def test_unpack_puts_them_back_on_zeros(shape, ratio):
    batch, height, width, side, channels = shape
    visible = random_visible(batch, (height, width), ratio)
    packing = Packing.of(visible)
    dense = torch.randn(batch, height * side, width * side, channels)
    cells = visible.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]
    assert torch.equal(packing.unpack(packing.pack(dense)), dense * cells)


def test_gradients_of_pack_and_unpack():
    packing = Packing.of(random_visible(2, (2, 3), 0.5))
    dense = torch.randn(2, 4, 6, 2, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.pack, dense)
    assert torch.autograd.gradcheck(packing.unpack, packed)
    assert torch.autograd.gradgradcheck(packing.pack, dense)


def test_a_known_count_gives_the_same_index():
    visible = random_visible(3, (5, 4), 0.6)
    assert torch.equal(Packing.of(visible).index, Packing.of(visible, 8).index)


def test_the_complement_holds_the_other_tokens():
    visible = random_visible(3, (5, 4), 0.6)
    others = Packing.of(visible, 8).complement()
    assert torch.equal(others.index, (~visible).flatten(1).nonzero()[:, 1].view(3, 12))
    assert torch.equal(others.visible, ~visible)
    everything = Packing.of(torch.ones(2, 3, 3, dtype=torch.bool))
    assert everything.complement().index.shape == (2, 0)


@pytest.mark.parametrize("counts", [(1, 2), (0, 0)])
def test_unequal_or_empty_masks_are_refused(counts):
    visible = torch.zeros(2, 2, 2, dtype=torch.bool)
    for image, count in enumerate(counts):
        visible[image].view(-1)[:count] = True
    with pytest.raises(UserError, match="same number of visible tokens"):
        Packing.of(visible)
