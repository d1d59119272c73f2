"""Line 3: what a model is trained to do. Every objective returns a sum and a count, never a mean."""
