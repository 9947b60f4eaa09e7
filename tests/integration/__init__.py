"""Parts against real Redis, real processes, real SSH servers."""
