"""One model served by several processes, by the placements that training's tensor parallelism uses."""
