"""SkyServe and SpotHedge in miniature: availability, cost and latency on made-up traces; a local fleet under kills."""
