import numpy as np
import pytest

from nanollm.sources.split import hash_to_unit


def test_equal_texts_draw_equal_numbers_and_keys_are_unrelated():
    texts = [f"text {n}" for n in range(20_000)]
    one, other = (np.array([hash_to_unit(text, key) for text in texts]) for key in ("a", "b"))
    assert (one == [hash_to_unit(text, "a") for text in texts]).all()
    assert one.mean() == pytest.approx(0.5, abs=0.01) and one.std() == pytest.approx(12**-0.5, abs=0.01)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


def test_a_number_is_below_one_whatever_the_hash(monkeypatch):
    class Highest:
        def __init__(self, *args, **options): ...

        def digest(self):
            return b"\xff" * 8

    monkeypatch.setattr("nanollm.sources.split.blake2b", Highest)
    assert 0.999 < hash_to_unit("text", "key") < 1


def test_a_key_of_any_length_is_taken():
    assert 0 <= hash_to_unit("text", "k" * 1000) < 1
