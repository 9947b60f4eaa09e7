"""Jobs of plain RQ producers: what they may count on, held against a fleet worker and a stock `rq worker`."""
