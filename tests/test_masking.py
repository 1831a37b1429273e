import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convmae import UserError
from convmae.masking import complementary_visible, random_visible, visible_count

grids = st.tuples(st.integers(1, 9), st.integers(2, 9))


@given(grid=grids, batch=st.integers(1, 4), ratio=st.floats(0.01, 0.99))
def test_every_image_keeps_the_same_number_of_tokens(grid, batch, ratio):
    visible = random_visible(batch, grid, ratio)
    assert visible.shape == (batch, *grid)
    assert visible.dtype == torch.bool
    assert visible.flatten(1).sum(1).tolist() == [visible_count(grid[0] * grid[1], ratio)] * batch


@pytest.mark.parametrize(
    ("tokens", "ratio", "count"), [(196, 0.75, 49), (196, 0.9, 19), (10, 0.9, 1), (4, 0.99, 1), (2, 0.01, 1)]
)
def test_visible_count(tokens, ratio, count):
    # 49 of 196 is the published code's len_keep = int(196 * 0.25); 19 is int(19.6).
    assert visible_count(tokens, ratio) == count


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_ratio_outside_zero_and_one_is_refused(ratio):
    with pytest.raises(UserError, match=r"outside \(0, 1\)"):
        visible_count(196, ratio)


@given(grid=grids, batch=st.integers(1, 3), data=st.data())
def test_complementary_sets_are_disjoint_and_cover_the_grid(grid, batch, data):
    tokens = grid[0] * grid[1]
    sets = data.draw(st.integers(2, tokens))
    visible = complementary_visible(batch, grid, sets)
    shown = visible.unflatten(0, (sets, batch)).sum(0)  # how many sets show a token
    assert shown.max() == 1
    assert (shown.flatten(1).sum(1) == tokens // sets * sets).all()
    assert (visible.flatten(1).sum(1) == tokens // sets).all()


@pytest.mark.parametrize("sets", [0, 1, 5])
def test_impossible_numbers_of_sets_are_refused(sets):
    with pytest.raises(UserError, match="choose 2 to 4"):
        complementary_visible(1, (2, 2), sets)


def test_a_generator_makes_masks_repeatable_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    first = random_visible(3, (14, 14), generator=torch.Generator().manual_seed(5))
    again = random_visible(3, (14, 14), generator=torch.Generator().manual_seed(5))
    other = random_visible(3, (14, 14), generator=torch.Generator().manual_seed(6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_all_tokens_are_equally_likely():
    share = random_visible(4000, (4, 4), 0.75).float().mean(0)
    # 4000 draws of p = 1/4: standard deviation 0.007; five of them around the mean.
    torch.testing.assert_close(share, torch.full((4, 4), 0.25), atol=0.035, rtol=0)
