"""What training takes and took: FLOPs, GPU-hours, money, energy, carbon, and the published systems to compare with."""
