"""Load generation against served models: latency, throughput, and whether every answer is right."""
