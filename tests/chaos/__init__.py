"""Faults on purpose, everybody's history of them, and a checker that was not there."""
