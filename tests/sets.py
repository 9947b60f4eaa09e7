"""Any set of requirements and any worker, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from broker.requirements import LabelRule, Offer, Requirements

G = 2**30
NOW = 1e9

keys = st.sampled_from(["gpu_type", "os", "zone", "rack"])
globs = st.sampled_from(["a100*", "l4", "*", "linux", "?x", "[ab]*", "A100 80GB"])
rules = st.builds(LabelRule, keys, globs, st.booleans())
needs = st.builds(
    Requirements,
    cpus=st.none() | st.integers(1, 64) | st.floats(0.001, 8),
    memory_bytes=st.none() | st.integers(2**20, 2**40),
    gpus=st.integers(0, 8) | st.floats(0.001, 1),
    gpu_memory_bytes=st.none() | st.integers(2**20, 2**37),
    labels=st.lists(rules, max_size=4).map(tuple),
    time_seconds=st.none() | st.integers(1, 10**6) | st.floats(0.001, 1e6),
    exclusive=st.booleans(),
    priority=st.integers(-40, 40),
)
offers = st.builds(
    Offer,
    labels=st.dictionaries(keys, st.sampled_from(["a100", "a100-80", "l4", "linux", "xx", "A100 80GB"])),
    cpus=st.integers(1, 128),
    memory_bytes=st.integers(0, 2**41),
    gpus=st.lists(st.sampled_from([0, 16 * G, 40 * G, 80 * G]), max_size=8).map(tuple),
    slots=st.integers(1, 64),
    ends_at=st.none() | st.integers(0, 10**6).map(lambda seconds: NOW + seconds),
)
