"""What a worker takes of the sets that there are, and which lists it waits on."""

from __future__ import annotations

from datetime import timedelta

from broker import clock
from broker.requirements import Offer, Requirements, parse
from broker.sets import Known, News
from broker.worker_settings import WorkerSettings
from fleet.placement import Placement
from fleet.resources import Gpu, Resources
from fleet.room import Room

GIB = 2**30


def placement(*needs: Requirements, ends_at: float | None = None) -> Placement:
    """A worker with four CPUs and slots, and these sets of the queue `q`."""
    offer = Offer({"zone": "a"}, 4, 8 * GIB, (), 4, ends_at)
    made = Placement(["q"], offer, Room(Resources(4, 8 * GIB), 4), WorkerSettings())
    made.learn(Known(1, {"q": {need.digest(): need for need in needs}}))
    return made


def waits_on(made: Placement) -> set[str]:
    return set(made.lists())


def news(version: int, need: Requirements | None, digest: str = "") -> News:
    return News(version, "q", digest or (need.digest() if need else ""), need)


def test_who_satisfies_no_set_says_nothing():
    made = placement(parse({"cpus": 5}), parse({"labels": ["zone=b"]}))
    assert (made.places(()).free, made.lists()) == ("", ("q",))


def test_a_set_is_heard_of_and_forgotten_again():
    made, need = placement(), parse({"cpus": 1})
    assert made.hear(news(2, need))
    assert waits_on(made) == {"q", need.queue_of("q")}
    assert made.hear(news(3, None, need.digest()))
    assert waits_on(made) == {"q"}


def test_a_gap_in_the_news_calls_for_all_of_them():
    need = parse({"cpus": 1})
    made = placement(need)
    assert not made.hear(news(3, parse({"cpus": 2})))
    assert made.hear(news(1, need)), "that is known already"
    assert waits_on(made) == {"q", need.queue_of("q")}


def test_news_of_no_later_version_that_are_not_known_call_for_all_of_them():
    need = parse({"cpus": 1})
    made = placement(need)
    assert not made.hear(news(1, parse({"cpus": 2}))), "Redis has lost what it had, and counts anew"
    assert not made.hear(news(1, None, need.digest()))
    assert made.hear(news(1, None, "gone")), "and so it is"


def test_it_waits_on_what_fits_the_room_that_is_left():
    one, four, alone = parse({"cpus": 1}), parse({"cpus": 4}), parse({"exclusive": True})
    made = placement(one, four, alone)
    assert waits_on(made) == {"q", *(need.queue_of("q") for need in (one, four, alone))}
    made.take("lease", one.queue_of("q"))
    assert waits_on(made) == {"q", one.queue_of("q")}
    made.count(4)  # three plain ones beside it
    assert waits_on(made) == set()
    made.count(1)
    made.give_back("lease")
    made.count(0)
    assert four.queue_of("q") in waits_on(made)


def test_what_is_held_for_a_large_job_is_offered_to_no_other():
    one, four = parse({"cpus": 1}), parse({"cpus": 4})
    made = placement(one, four)
    made.take("lease", one.queue_of("q"))
    assert made.hold(four.queue_of("q"))
    assert waits_on(made) == set()
    assert made.hold("")
    assert waits_on(made) == {"q", one.queue_of("q")}


def with_gpus(models: dict[str, int], *needs: Requirements) -> Placement:
    """A worker with GPUs of these models, GiB of memory each, and these sets."""
    names, sizes = tuple(models), tuple(size * GIB for size in models.values())
    offer = Offer({}, 4, 8 * GIB, sizes, 4, gpu_names=names)
    total = Resources(4, 8 * GIB, tuple(Gpu(*one) for one in zip(names, sizes, strict=True)))
    made = Placement(["q"], offer, Room(total, 4), WorkerSettings())
    made.learn(Known(1, {"q": {need.digest(): need for need in needs}}))
    return made


def test_a_gpu_that_the_held_job_could_not_use_is_given_to_another():
    large, any_one = parse({"gpus": 1, "gpu_memory": "40G"}), parse({"gpus": 1})
    made = with_gpus({"a": 80, "b": 16, "c": 24}, large, any_one)
    assert made.take("1", large.queue_of("q")).gpu_ids == (0,)
    made.hold(large.queue_of("q"))
    assert waits_on(made) == {"q", any_one.queue_of("q")}
    assert made.take("2", any_one.queue_of("q")).gpu_ids == (1,)
    made.give_back("1")
    assert waits_on(made) == {"q", any_one.queue_of("q"), large.queue_of("q")}
    assert made.take("3", any_one.queue_of("q")).gpu_ids == (2,), "the large one is kept"
    assert any_one.queue_of("q") not in waits_on(made)
    assert made.take("4", large.queue_of("q")).gpu_ids == (0,)


def test_a_gpu_that_is_shared_and_that_the_held_job_need_not_have_is_shared_further():
    whole, half = parse({"gpus": 1}), parse({"gpus": 0.5})
    made = with_gpus({"a": 16, "b": 16}, whole, half)
    made.take("1", half.queue_of("q"))
    made.take("2", whole.queue_of("q"))
    made.hold(whole.queue_of("q"))
    assert waits_on(made) == {"q"}, "the GPU that half a job has is the first to be whole again"
    made.give_back("2")
    assert half.queue_of("q") in waits_on(made)
    assert made.take("3", half.queue_of("q")).gpu_ids == (0,)
    assert half.queue_of("q") not in waits_on(made)
    assert made.take("4", whole.queue_of("q")).gpu_ids == (1,)


def test_two_halves_fit_beside_each_other_also_where_one_is_held():
    half, quarter = parse({"gpus": 0.5}), parse({"gpus": 0.25})
    made = with_gpus({"a": 16}, half, quarter)
    made.hold(half.queue_of("q"))
    made.take("1", quarter.queue_of("q"))
    assert quarter.queue_of("q") in waits_on(made)
    made.take("2", quarter.queue_of("q"))
    assert quarter.queue_of("q") not in waits_on(made)
    made.take("3", half.queue_of("q"))


def test_labels_that_change_are_judged_anew():
    need = parse({"labels": ["zone=b"]})
    made = placement(need)
    made.offer(Offer({"zone": "b"}, 4, 8 * GIB, (), 4))
    assert need.queue_of("q") in waits_on(made)


def test_time_that_runs_out_takes_sets_away(monkeypatch):
    need, now = parse({"time_request": 60}), clock.wall()
    made = placement(need, ends_at=now.timestamp() + 100)
    assert need.queue_of("q") in waits_on(made)
    monkeypatch.setattr(clock, "wall", lambda: now + timedelta(seconds=41))
    assert waits_on(made) == {"q"}
    assert made.places(()).free == ""
