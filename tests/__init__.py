"""Tests, by how much of the real thing they need: unit, integration, acceptance."""
