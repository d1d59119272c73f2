"""Plans searched by predicted time and memory. No torch."""
