"""Layer 7: pictures and pages from run directories."""
