"""Line 0: what every room stands on. Imports nothing of Luban and no torch."""
