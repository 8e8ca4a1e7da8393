"""The real-time profile of a host and its instances, and the certificate of a measured latency. PURE."""
