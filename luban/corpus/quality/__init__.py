"""Models that judge text, small enough for a laptop: trained here, kept as artifacts, used by steps."""
