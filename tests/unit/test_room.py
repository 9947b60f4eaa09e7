"""The packing of one worker: nothing is promised twice, and nothing that fits is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from broker.requirements import Requirements, parse
from fleet.resources import Gpu, Resources
from fleet.room import Grant, Room

G = 2**30


def room_of(cpus=4, memory=8 * G, gpus=(), slots=4, cpu_ids=()) -> Room:
    return Room(Resources(cpus, memory, tuple(Gpu("x", size) for size in gpus)), slots, cpu_ids)


needs = st.builds(
    Requirements,
    cpus=st.none() | st.integers(1, 6) | st.sampled_from([0.1, 0.25, 0.3, 0.333, 1.5]),
    memory_bytes=st.none() | st.integers(2**20, 6 * G),
    gpus=st.sampled_from([0, 0, 0, 1, 2, 0.1, 0.3, 0.333, 0.5, 0.7]),
    gpu_memory_bytes=st.sampled_from([None, None, 16 * G, 40 * G]),
    exclusive=st.sampled_from([False] * 9 + [True]),
)


class Packing(RuleBasedStateMachine):
    """Jobs come and go as they like; what they hold is added up beside the room."""

    leases = Bundle("leases")

    @initialize(
        cpus=st.integers(1, 8),
        memory=st.integers(0, 12 * G),
        gpus=st.lists(st.sampled_from([0, 16 * G, 40 * G, 80 * G]), max_size=4),
        slots=st.integers(1, 12),
        pins=st.booleans(),
    )
    def start(self, cpus, memory, gpus, slots, pins):
        self.ids = tuple(range(10, 10 + cpus)) if pins else ()
        self.room = room_of(cpus, memory, gpus, slots, self.ids)
        self.cpus, self.memory, self.gpus, self.slots = cpus, memory, gpus, slots
        self.held: dict[str, tuple[Requirements, Grant]] = {}
        self.count = 0

    @rule(target=leases, need=needs)
    def take(self, need):
        self.count += 1
        lease = f"lease-{self.count}"
        free = self.room.free()
        if not self.room.fits(need):
            with pytest.raises(ValueError):
                self.room.take(lease, need)
            assert self.room.free() == free
            return multiple()
        grant = self.room.take(lease, need)
        self.held[lease] = (need, grant)
        assert lease in self.room
        assert need.exclusive or (grant.cpus, grant.memory_bytes) == (need.cpus, need.memory_bytes)
        if not (need.exclusive and not need.gpus):
            assert len(grant.gpu_ids) == -(-need.gpus // 1)
            assert all(self.gpus[index] >= (need.gpu_memory_bytes or 0) for index in grant.gpu_ids)
        if self.ids and need.cpus and need.cpus == int(need.cpus):
            assert len(grant.cpu_ids) == need.cpus
        return lease

    @rule(lease=consumes(leases))
    def give_back(self, lease):
        self.room.give_back(lease)
        del self.held[lease]
        self.room.give_back(lease)
        assert lease not in self.room

    @invariant()
    def nothing_is_promised_twice(self):
        if not hasattr(self, "room"):
            return
        assert len(self.held) <= self.slots
        pinned = [cpu for _, grant in self.held.values() for cpu in grant.cpu_ids]
        assert len(pinned) == len(set(pinned))
        assert set(pinned) <= set(self.ids)
        plain = min(1, self.cpus / self.slots)
        cpus = sum(need.cpus if need.cpus is not None else plain for need, _ in self.held.values())
        assert cpus <= self.cpus + 1e-6
        assert sum(need.memory_bytes or 0 for need, _ in self.held.values()) <= self.memory
        for index in range(len(self.gpus)):
            shares = [grant.gpu_share for _, grant in self.held.values() if index in grant.gpu_ids]
            assert sum(shares) <= 1 + 1e-6
        assert len(self.held) <= 1 or not any(need.exclusive for need, _ in self.held.values())

    @invariant()
    def an_idle_room_is_whole_again(self):
        if hasattr(self, "room") and not self.held:
            free = self.room.free()
            assert (free.slots, free.cpus, free.gpus) == (self.slots, self.cpus, (1,) * len(self.gpus))
            assert self.memory - 2**20 < free.memory_bytes <= self.memory


TestPacking = Packing.TestCase
TestPacking.settings = settings(max_examples=60, stateful_step_count=40)


@given(needs, st.lists(needs, max_size=6))
def test_a_job_that_takes_no_more_fits_where_the_larger_did(need, others):
    room = room_of(gpus=(80 * G, 16 * G), slots=8)
    for number, other in enumerate(others):
        if room.fits(other):
            room.take(str(number), other)
    smaller = Requirements(cpus=need.cpus and need.cpus / 2, memory_bytes=need.memory_bytes)
    assert room.fits(smaller) or not room.fits(need)


def test_half_gpus_share_one_and_leave_the_other_whole():
    room = room_of(gpus=(80 * G, 80 * G), slots=8)
    first = room.take("a", Requirements(gpus=0.5))
    second = room.take("b", Requirements(gpus=0.5))
    assert (first.gpu_ids, second.gpu_ids) == ((0,), (0,))
    assert room.take("c", Requirements(gpus=1)).gpu_ids == (1,)
    assert not room.fits(Requirements(gpus=0.1))
    room.give_back("a")
    assert room.fits(Requirements(gpus=0.5))
    assert room.free().gpus == (0.5, 0)


def test_a_share_goes_where_the_least_is_left():
    room = room_of(gpus=(80 * G, 80 * G), slots=8)
    room.take("a", Requirements(gpus=0.3))
    room.take("b", Requirements(gpus=0.8))
    assert room.free().gpus == pytest.approx((0.7, 0.2))
    assert room.take("c", Requirements(gpus=0.2)).gpu_ids == (1,)


def test_small_gpus_go_first_and_large_ones_stay_for_those_who_need_them():
    room = room_of(gpus=(80 * G, 16 * G, 40 * G), slots=8)
    assert room.take("a", Requirements(gpus=1)).gpu_ids == (1,)
    assert room.take("b", Requirements(gpus=1, gpu_memory_bytes=20 * G)).gpu_ids == (2,)
    assert room.take("c", Requirements(gpus=1, gpu_memory_bytes=60 * G)).gpu_ids == (0,)


def test_gpus_go_by_their_index_on_the_host():
    room = Room(Resources(4, 8 * G, (Gpu("x", G), Gpu("x", G))), 4, gpu_ids=(5, 7))
    assert room.take("a", Requirements(gpus=1)).gpu_ids == (5,)
    assert room.take("b", Requirements(gpus=0.5)).gpu_ids == (7,)
    assert room.free().gpus == (0, 0.5)


def test_thirds_of_a_gpu_are_three():
    room = room_of(gpus=(G,), slots=8)
    for lease in "abc":
        room.take(lease, Requirements(gpus=1 / 3))
    assert not room.fits(Requirements(gpus=1 / 3))


def test_plain_jobs_fill_the_slots_whatever_the_cpus():
    for slots in (1, 3, 4, 7):
        room = room_of(cpus=4, slots=slots)
        for number in range(slots):
            room.take(str(number), Requirements())
        assert not room.fits(Requirements())


def test_a_job_with_all_cpus_leaves_no_room_for_plain_ones():
    room = room_of(cpus=4, slots=4)
    room.take("big", Requirements(cpus=4))
    assert not room.fits(Requirements())
    assert not room.fits(Requirements(cpus=0.1))


def test_an_exclusive_job_has_the_worker_for_itself():
    room = room_of(cpus=4, gpus=(G, G), cpu_ids=(0, 1, 2, 3))
    room.take("small", Requirements())
    assert not room.fits(Requirements(exclusive=True))
    room.give_back("small")
    grant = room.take("big", Requirements(exclusive=True))
    assert grant == Grant(4, (0, 1, 2, 3), None, (0, 1), 1)
    assert not room.fits(Requirements())
    assert room.free().slots == 0
    room.give_back("big")
    assert room.take("fewer", Requirements(exclusive=True, cpus=2, gpus=1)).cpu_ids == (0, 1)


def test_jobs_are_pinned_to_whole_cpus_of_their_own():
    room = room_of(cpus=4, slots=8, cpu_ids=(2, 3, 6, 7))
    assert room.take("a", Requirements(cpus=2)).cpu_ids == (2, 3)
    assert room.take("b", Requirements(cpus=0.5)).cpu_ids == ()
    assert room.take("c", Requirements(cpus=1)).cpu_ids == (6,)
    room.give_back("a")
    assert room.take("d", Requirements(cpus=2)).cpu_ids == (2, 3)


def test_nobody_is_pinned_where_more_cpus_are_promised_than_there_are():
    assert room_of(cpus=8, cpu_ids=(0, 1)).take("a", Requirements(cpus=1)).cpu_ids == ()


def test_a_lease_takes_once():
    room = room_of()
    room.take("a", Requirements(cpus=1))
    with pytest.raises(ValueError):
        room.take("a", Requirements(cpus=1))


def test_of_unlike_gpus_those_are_given_of_which_the_label_holds():
    names = ("A100", "T4", "A100")
    room = Room(Resources(4, G, tuple(Gpu(name, G) for name in names)), 4, gpu_ids=(4, 5, 6))
    need = parse({"gpus": 1, "labels": ["gpu_name=A100"]})
    half = parse({"gpus": 0.5, "labels": ["gpu_name!=A*"]})
    assert not room.fits(parse({"gpus": 3, "labels": ["gpu_name=A100"]}))
    assert [room.take(str(number), need).gpu_ids for number in range(2)] == [(4,), (6,)]
    assert not room.fits(need)
    assert room.take("half", half).gpu_ids == (5,)
    room.give_back("0")
    room.call_gpus(["mine", "mine", "mine"])
    assert not room.fits(need)
    assert room.take("named", parse({"gpus": 1, "labels": ["gpu_name=mine"]})).gpu_ids == (4,)


def test_what_it_gets_later_is_for_jobs_beside_those_that_run():
    room = room_of(cpus=1, memory=G, gpus=(), cpu_ids=(3,))
    first = room.take("first", Requirements(cpus=1, memory_bytes=G))
    total = Resources(3, 4 * G, (Gpu("x", G, 5),))
    room.hold(total, (1, 2, 3), (5,))
    assert (room.free().cpus, room.free().memory_bytes, room.free().gpus) == (2, 3 * G, (1,))
    second = room.take("second", Requirements(cpus=2, gpus=1))
    assert (first.cpu_ids, second.cpu_ids, second.gpu_ids) == ((3,), (1, 2), (5,))
    assert not room.fits(Requirements(cpus=1))
