import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.data.packing import STEP, PackedLayout, best_width, even_rows, pack

CAPACITY = 50
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=60)


@given(lengths=LENGTHS)
@settings(deadline=None)
def test_every_sequence_lies_in_exactly_one_row_and_no_row_is_over_full(lengths):
    rows = pack(lengths, CAPACITY)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= CAPACITY for row in rows)
    assert pack(list(lengths), CAPACITY) == rows


@given(lengths=LENGTHS)
@settings(deadline=None)
def test_no_two_rows_would_fit_into_one(lengths):
    used = sorted(sum(lengths[index] for index in row) for row in pack(lengths, CAPACITY))
    assert sum(used[:2]) > CAPACITY or len(used) < 2


def next_fit(lengths: list[int]) -> int:
    """Rows that filling one after the other takes."""
    rows, room = 0, 0
    for length in lengths:
        if length > room:
            rows, room = rows + 1, CAPACITY
        room -= length
    return rows


@pytest.mark.parametrize("longest", [10, 25, 40, CAPACITY])
@pytest.mark.parametrize("seed", range(5))
def test_rows_are_fewer_than_one_after_the_other_and_nearly_full(longest, seed):
    lengths = torch.randint(1, longest + 1, (400,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = pack(lengths, CAPACITY)
    assert len(rows) <= next_fit(lengths)
    assert len(rows) <= 1.06 * sum(lengths) / CAPACITY + 1


@pytest.mark.parametrize("length", [0, CAPACITY + 1])
def test_a_sequence_that_fits_no_row_is_refused(length):
    with pytest.raises(ValueError, match=f"a row of 50 places takes sequences of 1 to 50, got one of {length}"):
        pack([3, length], CAPACITY)


@given(lengths=st.lists(st.integers(1, CAPACITY), min_size=1, max_size=30), multiple=st.integers(1, 4))
@settings(deadline=None)
def test_what_goes_with_the_tokens_is_found_again_in_their_places(lengths, multiple):
    layout = PackedLayout.of(lengths, CAPACITY, multiple)
    vectors = [torch.rand(length) + index + 1 for index, length in enumerate(lengths)]
    placed = layout.place(vectors, empty=-1.0)
    assert placed.shape == (len(layout.rows), CAPACITY)
    assert len(layout.rows) % multiple == 0
    for start, vector in zip(layout.starts.tolist(), vectors, strict=True):
        row, column = divmod(start, CAPACITY)
        assert torch.equal(placed[row, column : column + len(vector)], vector)
    assert int((placed == -1).sum()) == placed.numel() - sum(lengths)
    assert layout.fill == pytest.approx(sum(lengths) / placed.numel())
    assert torch.equal(placed.flatten()[layout.token_indices], torch.cat(vectors))


def test_no_sequence_at_all_still_gives_rows_of_the_same_shape():
    assert PackedLayout.of([3], 10, multiple=4).rows == [[0], [], [], []]
    assert PackedLayout.of([], 10, multiple=4).rows == [[], [], [], []]


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), limit=st.integers(300, 2000), masked=st.booleans()
)
@settings(deadline=None)
def test_a_width_is_one_of_few_and_holds_the_longest(lengths, limit, masked):
    width = best_width(lengths, limit, is_masked=masked)
    assert max(lengths) <= width <= limit
    assert width % STEP == 0 or width == limit
    assert pack(lengths, width)


def test_rows_are_as_wide_as_leaves_little_empty():
    """Four of 97 places fill 416 better than one fills 128; a mask of 416 x 416 costs more than that."""
    lengths = [97] * 60
    assert best_width(lengths, 4096, is_masked=False) == 416
    assert best_width(lengths, 4096, is_masked=True) == 224
    assert best_width(lengths, 300, is_masked=False) == 224
    assert best_width([5] * 60, 30, is_masked=False) == 30


@given(rows=st.integers(1, 200), most=st.integers(1, 50))
def test_portions_of_rows_are_as_few_as_can_be_and_even(rows, most):
    each = even_rows(rows, most)
    batches = -(-rows // each)
    assert each <= most
    assert batches == -(-rows // most)
    assert batches * each - rows < batches <= rows  # no portion is empty
