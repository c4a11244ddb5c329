"""Who falls silent is missed, and only they."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from nanollm import heartbeat
from nanollm.heartbeat import Heartbeat, meet


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.02)


def beating(store, rank, size, said):
    own = Heartbeat(store, rank, size, silence_s=0.5, leave=said.append)
    return own.__enter__()


def meet_all(store, size, **options):
    with ThreadPoolExecutor(size) as pool:
        return [each.result() for each in [pool.submit(meet, store, rank, size, **options) for rank in range(size)]]


def test_ranks_that_meet_share_a_namespace_of_the_store_in_which_nothing_is_left_of_an_earlier_attempt():
    store = HashStore()
    for _ in range(3):
        namespaces = meet_all(store, 3)
        assert not any(namespace.check(["word"]) for namespace in namespaces)
        namespaces[2].set("word", "of this attempt")
        assert all(namespace.get("word") == b"of this attempt" for namespace in namespaces)


def test_a_rank_that_stays_away_is_named():
    with pytest.raises(ConnectionError, match="rank 1 did not join the job within 0 s"):
        meet(HashStore(), 0, 2, limit_s=0.3)
    with pytest.raises(ConnectionError, match="rank 0 did not join the job"):
        meet(HashStore(), 1, 2, limit_s=0.3)


def wait_for(said, seconds=5.0):
    end = time.monotonic() + seconds
    while not said and time.monotonic() < end:
        time.sleep(0.01)
    return said


def test_ranks_that_beat_are_not_missed():
    store, said = HashStore(), []
    ranks = [beating(store, rank, 3, said) for rank in range(3)]
    time.sleep(1.5)
    for rank in ranks:
        rank.stop()
    assert said == []


def test_a_silent_rank_is_missed_by_the_first_and_named_with_its_host(monkeypatch):
    monkeypatch.setattr(heartbeat.socket, "gethostname", lambda: "the-host")
    store, said, unheard = HashStore(), [], []
    first, second, third = (beating(store, rank, 3, said if rank == 0 else unheard) for rank in range(3))
    time.sleep(0.1)
    third.stop()  # as if its host stood still
    (message,) = wait_for(said)
    assert "rank 0 of 3 ends: nothing was heard of rank 2 on host the-host for 0 s" in message
    assert "goes on from the last checkpoint" in message
    assert unheard == []
    first.stop()
    second.stop()


def test_the_others_miss_the_first():
    store, said, unheard = HashStore(), [], []
    first, second = beating(store, 0, 2, unheard), beating(store, 1, 2, said)
    first.stop()
    (message,) = wait_for(said)
    assert "rank 1 of 2 ends: nothing was heard of rank 0" in message
    second.stop()


def test_a_rank_that_never_began_is_missed_without_a_host():
    store, said = HashStore(), []
    beating(store, 0, 2, said).store.set("beat/1", "")
    (message,) = wait_for(said)
    assert "nothing was heard of rank 1 for" in message


def test_many_missed_ranks_are_told_in_one_line():
    message = heartbeat.farewell_message(0, 9, [f"rank {rank}" for rank in range(1, 9)], 30)
    assert "rank 1, rank 2, rank 3, rank 4 and 4 more for 30 s" in message


def test_who_waits_for_others_says_so(monkeypatch, capsys):
    monkeypatch.setattr(heartbeat, "SAID_AFTER_S", 0.1)
    with pytest.raises(ConnectionError):
        meet(HashStore(), 0, 3, limit_s=0.5)
    assert capsys.readouterr().err == "waiting for rank 1, rank 2, 0 s in all; what keeps it is said on its host\n"
