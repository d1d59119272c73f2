"""Foreign model formats: one file each, that says how a configuration and its tensor names correspond to ours."""
