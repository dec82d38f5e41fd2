"""What a Prometheus server and a load balancer read: metrics, ZEO's own figures, health."""
