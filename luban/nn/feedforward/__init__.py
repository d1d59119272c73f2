"""The position-wise network of a layer: two matmuls around an activation, or three with a gate."""
