"""Instruction data made by models: Self-Instruct and Alpaca (Wang et al. 2023; Taori et al. 2023)."""
