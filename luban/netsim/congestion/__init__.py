"""Congestion control: one file an algorithm, its configuration above, its compiled functions below.

An algorithm has up to five functions over the state `s` and a lane's number: `start`, `on_ack`, `on_loss` (a lost packet was
noticed, at most once a window), `on_timeout` and `on_timer`. It sets `lane.window` (bytes) and `lane.rate` (bytes a ps, 0: not
paced), keeps its own numbers in `s.cc[lane]` and reads its parameters from `params_at(s, lane)`.
"""
