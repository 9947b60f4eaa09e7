"""Machines and processes: the worker, its executors, launchers, the embedded Redis."""
