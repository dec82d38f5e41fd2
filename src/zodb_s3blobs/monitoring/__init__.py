"""The monitoring side: metrics and ZEO's own statistics for Prometheus, health for load balancers."""
