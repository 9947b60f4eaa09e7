"""Metrics, rules, alerts and dashboards, held by a real Prometheus that scrapes real fleets."""
